"""Tables and figures of the logs."""
