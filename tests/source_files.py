"""Image files and tar files to test sources with, and what is asked of every source."""

import io
import pickle
import tarfile

import pytest
from PIL import Image

from vqdist.errors import UserError


def save(path, value=0, size=(4, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 0, 0)).save(path)
    return path


def encoded(value=0, extension="png"):
    buffer = io.BytesIO()
    Image.new("L", (4, 4), value).save(buffer, extension)
    return buffer.getvalue()


def message_of(call, *args, **kwargs):
    """Return the text of the `UserError` that a call raises: always one line."""
    with pytest.raises(UserError) as info:
        call(*args, **kwargs)
    assert "\n" not in str(info.value)
    return str(info.value)


def same_after_pickling(source):
    copy = pickle.loads(pickle.dumps(source))
    assert len(copy) == len(source) and copy.fingerprint() == source.fingerprint()
    for index in range(len(source)):
        assert copy.image(index).tobytes() == source.image(index).tobytes()
        assert copy.label(index) == source.label(index) and copy.name(index) == source.name(index)
    return True


def write_tar(path, entries):
    with tarfile.open(path, "w") as tar:
        for name, content in entries:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path
