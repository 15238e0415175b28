"""Errors that a program prints in one line, and what runs a program."""
import gc
import os
import signal
import sys
import time
import warnings


class UserError(Exception):
    """A mistake of the user's, printed in one line: which option or file, what was found, what was expected."""


def run(main):
    """Run a program's main(); a UserError ends it with one line on stderr and exit status 2."""
    if not gc.isenabled():                                      # see options.answer_early
        gc.enable()
        gc.freeze()                                             # looking through all that is imported takes a second
    warnings.filterwarnings('ignore', module='PIL')             # of images that are readable all the same
    sys.stdout = sys.stdout or open(os.devnull, 'w')            # noqa: SIM115, None where it is closed
    if hasattr(sys.stdout, 'reconfigure'):
        sys.stdout.reconfigure(errors='backslashreplace')       # class names may be any bytes
    message, status, together = None, 2, False                  # together: all processes end here
    try:
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:   # see options.answer_early
            signal.signal(signal.SIGINT, signal.default_int_handler)
        main()
        status, together = 0, True
    except SystemExit as stop:
        status, together = stop.code, True
    except UserError as error:
        message = str(error)
        # What is deleted with the error, as a file on a full disk or half a DataLoader, may fail once more.
        sys.unraisablehook = lambda failure: None
    except KeyboardInterrupt:
        status = 130
    except BaseException as error:
        message = _explained(error)
        if message is None:
            leave_processes(1, traceback=True)
            raise
    if together:
        end_processes()
    if message:
        if os.environ.get('RANK', '0') != '0':                  # torchrun ends the others when rank 0 has printed it
            time.sleep(3)
        line = f"{os.path.basename(sys.argv[0])}: error: {printable(' '.join(message.split()))}"
        print(line, file=sys.stderr, flush=True)
    if not together:
        leave_processes(status)
    if status:
        sys.exit(status)


def _explained(error):
    """What to print instead of a traceback; None where that is needed."""
    text = str(error)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and (
            'out of memory' in text or 'allocate memory' in text)):
        advice = 'out of memory: try --accum_steps, --amp, or a smaller --batch_size, --size or --model'
        return f'{advice} ({text})' if text else advice
    if isinstance(error, RuntimeError) and is_peer_failure(error):
        return f'another process has ended: see its own lines for the reason ({error})'
    return None


def _process_group():
    """torch.distributed after the rendezvous of torchrun's processes, else None."""
    dist = sys.modules.get('torch.distributed')                 # not imported, not started
    return dist if dist and dist.is_available() and dist.is_initialized() else None


def end_processes():
    """Leave the other processes of torchrun, at the end of the program."""
    if dist := _process_group():
        gc.collect()                    # a network and its DistributedDataParallel, which would abort at exit (gloo)
        dist.destroy_process_group()


def leave_processes(status, traceback=False):
    """End this process at once, if it is one of several: what waits for the others would wait in vain."""
    if _process_group():
        if traceback:
            sys.excepthook(*sys.exc_info())
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def is_peer_failure(error):
    """Whether an error only means that another process has ended."""
    dist = _process_group()
    return dist is not None and (isinstance(error, dist.DistError) or 'gloo' in str(error))


def silence(stream):
    """Let a stream whose reader has gone swallow what is still written to it."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def printable(line):
    """A line without what is none of its characters: control characters, bytes that are no text."""
    return ''.join(c if c.isprintable() or c == '\t' else c.encode('unicode_escape').decode() for c in line)
