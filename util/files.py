"""Files: a run's are written completely or not at all, never through links, in a folder that one process holds; of
others only regular files are read, and their names are the same in every locale."""
import contextlib
import os
import stat
import zipfile

from util.distributed import rank
from util.errors import UserError

try:
    import fcntl
except ImportError:                                     # Windows
    fcntl = None


def open_no_follow(name, flags):
    """An opener for `open`: OSError for a link, and for a pipe, of which opening may wait for ever."""
    return os.open(name, flags | getattr(os, 'O_NOFOLLOW', 0) | getattr(os, 'O_NONBLOCK', 0), 0o666)


class FolderLock:
    """Keeps other processes from writing to a run's folder as long as this one lives: the locked file .lock in it."""
    held = set()                                        # the open files of all locks of this process

    def __init__(self, folder):
        self.folder, self.file = folder, None

    def acquire(self):
        """UserError where another process holds the folder."""
        if rank() or fcntl is None:
            return
        self.file = open(self.folder / '.lock', 'a', opener=open_no_follow)   # noqa: SIM115, closed by release
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise UserError(f'{self.folder}: another process is writing this run, expected it to end, or another '
                            '--trial or --output_name') from None
        except OSError:                                                 # a file system without locks
            pass
        self.held.add(self.file)

    def release(self):
        if self.file:
            self.held.discard(self.file)
            self.file.close()
            self.file = None


if fcntl:                                               # a worker process may live a little longer than the run
    os.register_at_fork(after_in_child=lambda: [FolderLock.held.pop().close() for _ in list(FolderLock.held)])


def check_locks():
    """UserError where a run's folder, or its lock, was removed or replaced: another process may be writing there."""
    for lock in FolderLock.held:
        try:
            intact = os.path.samestat(os.fstat(lock.fileno()), os.stat(lock.name))
        except OSError:
            intact = False
        if not intact:
            raise UserError(f'{lock.name}: removed or replaced during the run, expected its folder to be left alone')


@contextlib.contextmanager
def writing(file):
    """UserError where a file or folder cannot be written, or this process no longer holds the run's folder."""
    check_locks()
    try:
        yield
    except OSError as error:
        raise UserError(f'{file}: cannot be written ({error})') from error


def replace_file(file, content):
    """Write a file under its name without touching what a link under that name leads to."""
    partial = file.with_name(f'{file.name}.partial')
    partial.unlink(missing_ok=True)
    try:
        partial.write_bytes(content)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)                 # where the disk is full


def stored_bytes(file):
    """Size of what a zip file holds, as it lies there; None where it is none or something in it would inflate."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except (OSError, ValueError, zipfile.BadZipFile):
        return None
    size = sum(member.file_size for member in members)
    stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
    return size if stored and size <= os.path.getsize(file) else None


def open_regular(file, largest):
    """A binary stream of a regular file, links followed; ValueError for a pipe or device, of which reading may never
    end, and for a file of no bytes (also those of the kernel in /proc) or more than `largest`."""
    status = os.stat(file)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError('not a regular file')
    if not 0 < status.st_size <= largest:
        raise ValueError(f'{status.st_size} bytes, expected 1 to {largest}')
    return open(file, 'rb')


def as_text(name):
    """The name of a file or folder decoded as UTF-8, whatever the locale: the same names and order everywhere."""
    return os.fsencode(name).decode('utf-8', 'surrogateescape')


def files_below(folder):
    """All files below a folder but hidden ones and those in hidden folders; links are followed, each folder is visited
    once, none above it.

    Raises OSError where a folder cannot be listed.
    """
    def stop(error):
        raise error

    start, visited = os.path.realpath(folder), set()
    for parent, folders, names in os.walk(folder, onerror=stop, followlinks=True):
        folders[:] = sorted((name for name in folders if not name.startswith('.')),
                            key=as_text)                # of several links to a folder the same one every time
        real = os.path.realpath(parent)
        if real in visited or start.startswith(os.path.join(real, '')):
            folders.clear()
            continue
        visited.add(real)
        yield from (os.path.join(parent, name) for name in names if not name.startswith('.'))
