"""Keys as names of tar members, and back.

A key may be any text (a path of a CSV, say), a member's name may not: readers of WebDataset cut a name at the first dot
of its last component, and whoever unpacks a shard makes files of its names. A key that would not come back as itself,
or would lead out of a folder, is percent-encoded, and stands as it is in the json member under `KEY_FIELD`.
"""

from __future__ import annotations

import re
from urllib.parse import quote

from otcclip.data.decode import BadPair

KEY_FIELD = "__key__"
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def is_plain(key: str) -> bool:
    """Whether `key` can be a member's name as it stands."""
    # No percent sign: so no plain key is another's encoding, and neighbours never run into one sample.
    if "%" in key or "\\" in key or _CONTROL.search(key):
        return False
    *folders, last = key.split("/")
    return bool(last) and "." not in last and not {"", ".", ".."} & set(folders)


def member_name(key: str) -> str:
    """What a pair's members are called, but for their extensions: `key` where it is plain. No two keys share one.

    Raises:
        UnicodeEncodeError: half a surrogate pair, which is no text.
    """
    if is_plain(key):
        key.encode()
        return key
    # `quote` leaves dots alone. A bare percent sign, which no other key gives, is the empty key.
    return quote(key, safe="").replace(".", "%2E") or "%"


def key_of(name: str, fields: dict[str, str]) -> str:
    """The key of the members called `name`; takes `KEY_FIELD` out of their json's `fields`.

    Raises:
        BadPair: the json claims a key that would have got another name, such as another pair's.
    """
    key = fields.pop(KEY_FIELD, name)
    if key != name and member_name(key) != name:
        raise BadPair("broken metadata")
    return key
