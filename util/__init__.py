"""What the programs share. Set here, since it must be before protobuf is imported, by whichever package:
tensorboard-logger's generated messages are older than protobuf 4, whose Python implementation still reads them."""
import os

os.environ.setdefault('PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION', 'python')
