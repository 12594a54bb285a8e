"""What the operating system or FFmpeg said, turned into an :class:`ExportError` that says what to do.

Used by the writer and by the bridge (which claims the file's name before anything is written).
"""

import errno
from pathlib import Path

from ..errors import ExportError

_REMEDIES = {
    errno.ENOSPC: "The disk is full. Free some space, or write to another disk.",
    errno.EFBIG: "The file became larger than this disk or account allows. Use a higher quality number, or write to another disk.",
    errno.EACCES: "No permission to write there. Allow writing to the folder, close programs that have the file open, or choose another folder.",
    errno.EROFS: "The disk is read-only. Choose another folder.",
    errno.ENOENT: "The folder does not exist, or on Windows its path is too long (260 letters). Create it, or choose another one.",
    errno.ENOTDIR: "A file stands where a folder should be. Rename it, or choose another folder.",
    errno.EEXIST: "A file stands where a folder should be. Rename it, or choose another folder.",
    errno.EISDIR: "A folder of that name exists. Choose another file name.",
    errno.ENOTEMPTY: "A folder of that name holds files. Choose another name.",
    errno.ENAMETOOLONG: "The name is too long. Choose a shorter one.",
    errno.EIO: "The disk reported an error. Check it, or write to another disk.",
}
_REMEDIES[errno.EPERM] = _REMEDIES[errno.EACCES]
if hasattr(errno, "EDQUOT"):  # absent on some systems
    _REMEDIES[errno.EDQUOT] = _REMEDIES[errno.ENOSPC]


def export_error(path: Path, error: Exception) -> ExportError:
    """Explain why ``path`` could not be written.

    Args:
        path: the video the user asked for (never the temporary name).
        error: an ``OSError`` or any error of PyAV (whose ``errno`` is the system's where the cause is the disk).

    Returns:
        The error to raise ``from error``.
    """
    remedy = _REMEDIES.get(getattr(error, "errno", None) or 0)
    if remedy is None:
        remedy = "Try another format, size or quality; if the encoder is missing, install PyAV from its wheel (pip install av)."
    return ExportError(f"Could not write the video {path}: {getattr(error, 'strerror', None) or error}. {remedy}")
