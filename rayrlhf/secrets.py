"""Secrets of a configuration: where they may stand, `${VARIABLE}` in their place, and `***` wherever
something that holds one is written.

A secret is the value of an HTTP header (but those of `HARMLESS_HEADERS`), the user and password of a URL, the
value of a URL's query parameter or of a key whose name says so (`token`, `api_key`, …), and whatever
`${VARIABLE}` stood for in a header or a URL. A part of a URL's path is none that can be known: name it by a
variable.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import quote, quote_plus, unquote_plus

MASK = "***"
SHORTEST_MASKED = 6  # characters; a shorter one would be found in innocent words
HARMLESS_HEADERS = {
    *("accept", "accept-charset", "accept-encoding", "accept-language", "cache-control", "connection"),
    *("content-encoding", "content-type", "date", "from", "host", "origin", "pragma", "referer"),
    *("traceparent", "tracestate", "user-agent", "x-request-id"),
}

REFERENCE = re.compile(r"\$\{([A-Za-z_]\w*)\}")
FROM_ENVIRONMENT = re.compile(r"env:(\S+)")  # the whole of a header's value
_SECRET_NAME = re.compile(
    r"(^|[-_.])(token|key|apikey|api_?key|accesskey|secret|password|passwd|passphrase|pwd|auth|authorization"
    r"|bearer|cookie|sig|signature|credentials?|session|sas|jwt)$",
    re.IGNORECASE,
)
# A name that says so wherever it stands, in keys that are not ours as well; `data.label_key` is none.
_SURELY_SECRET_NAME = re.compile(
    r"authorization|password|passwd|passphrase|secret|api-?_?key|cookie|bearer", re.I
)
_HEADER_LINE = re.compile(
    r"(?i)(?P<start>\b(?:(?:proxy-)?authorization|x-(?:[a-z]+-)*(?:key|token))[\"']?\s{0,9}[:=]\s{0,9}[\"']?"
    r"(?:(?:bearer|basic|token)\s+)?)(?P<secret>[^\s\"',}]+)"
)
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")
_USERINFO = re.compile(r"(?P<start>\b[A-Za-z][A-Za-z0-9+.-]{0,30}://)(?P<secret>[^/\s?#]{1,4096})@")
# Only those of secrets are looked for: the value of another may hold one behind a semicolon.
_PARAMETER = re.compile(r"(?P<start>[?&;#](?P<name>[^=&;#\s?]{1,100})=)(?=(?P<secret>[^&#\s]{1,8192}))")
_SCHEME = re.compile(r"(?i)(?:bearer|basic|token|apikey|digest|key)\s+")

_known: set[str] = set()  # of this process, see `remember`


def is_secret_name(name: str) -> bool:
    """Whether a query parameter, a variable or a user's own key of this name holds a secret."""
    name = unquote_plus(name)
    return bool(_SECRET_NAME.search(name) or _SECRET_NAME.search(_CAMEL.sub("_", name)))


def references(text: str) -> list[str]:
    """The names of the environment's variables that a header's value or a URL refers to."""
    whole = FROM_ENVIRONMENT.fullmatch(text)
    return [whole[1]] if whole else REFERENCE.findall(text)


def resolve(text: str, *, in_url: bool = False) -> str:
    """The text with `${VARIABLE}` (and, as the whole text, `env:VARIABLE`) replaced by what the environment
    holds, which is remembered as a secret. Raises `KeyError` with the name of a variable that is not set.
    """
    whole = FROM_ENVIRONMENT.fullmatch(text)
    found = {name: os.environ[name] for name in references(text)}
    remember(found.values())
    if whole and not in_url:
        return found[whole[1]]
    return REFERENCE.sub(lambda reference: found[reference[1]], text)


def remember(secrets: Iterable[str]) -> None:
    """Have `masked` replace these values too, from now on and in this process: once one is in a header, any
    library's error message and any server's page may quote it. Kept by the process, since what quotes it
    cannot be handed the value.
    """
    for secret in secrets:
        for part in {secret, _SCHEME.sub("", secret, count=1), quote(secret, safe=""), quote_plus(secret)}:
            if len(part.strip()) >= SHORTEST_MASKED:
                _known.add(part.strip())


def masked(text: str) -> str:
    """The text with `***` for the secrets that its URLs and header lines hold and for those that are
    remembered.
    """
    if "://" in text:
        text = _USERINFO.sub(lambda found: f"{found['start']}{_mask_literal(found['secret'])}@", text)
    if "=" in text:
        for start, stop in reversed(list(_secret_parameters(text))):
            text = text[:start] + _mask_literal(text[start:stop]) + text[stop:]
    if _HEADER_LINE.search(text):
        text = _HEADER_LINE.sub(lambda found: found["start"] + _mask_literal(found["secret"]), text)
    for secret in sorted(_known, key=len, reverse=True):
        text = text.replace(secret, MASK)
    return text


def masked_tree(tree: Any) -> Any:
    """A configuration as plain values, with `***` for its literal secrets; references stay."""
    return _changed(tree, lambda _path, _secret: MASK, "")


def secrets_in(tree: Any) -> dict[str, str]:
    """Key path -> literal secret there."""
    found: dict[str, str] = {}

    def note(path: str, secret: str) -> str:
        found[path] = secret
        return MASK

    _changed(tree, note, "")
    return found


def remember_all(tree: Any) -> None:
    """`remember` the secrets of a configuration and the parts of its URLs that are."""
    for secret in secrets_in(tree).values():
        remember([secret] if "://" not in secret else _secrets_of_url(secret))


def is_masked(text: str) -> bool:
    """Whether a value is what `masked_tree` left of one."""
    return MASK in text


def _changed(tree: Any, change: Callable[[str, str], str], at: str) -> Any:
    if isinstance(tree, Mapping):
        return {key: _changed_item(str(key), value, change, at) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_changed(item, change, _join(at, str(index))) for index, item in enumerate(tree)]
    if isinstance(tree, str) and "://" in tree and any(True for _ in _secrets_of_url(tree)):
        change(at, tree)
        return masked(tree)
    return tree


def _changed_item(key: str, value: Any, change: Callable[[str, str], str], at: str) -> Any:
    path = _join(at, key)
    if key in ("env_from_secret", "auth_secret"):  # names of secrets, whatever the variables are called
        return value
    if key in ("headers", "header") and isinstance(value, Mapping):
        return {
            name: change(_join(path, str(name)), text) if _is_secret_header(str(name), text) else text
            for name, text in value.items()
        }
    if key in ("headers", "header") and isinstance(value, list | str):  # a mistake, which will be quoted
        texts = value if isinstance(value, list) else [value]
        return [
            change(_join(path, str(n)), text) if isinstance(text, str) else text
            for n, text in enumerate(texts)
        ]
    is_secret = _SURELY_SECRET_NAME.search(key) or (_is_users_own(at) and is_secret_name(key))
    if isinstance(value, str) and is_secret and _is_literal(value):
        return change(path, value)
    return _changed(value, change, path)


def _is_users_own(path: str) -> bool:
    """Below mappings whose keys the user makes up; our own `data.label_key` is no secret."""
    return bool(re.search(r"(^|\.)(arguments|env|tags)(\.|$)", path))


def _is_secret_header(name: str, value: Any) -> bool:
    return isinstance(value, str) and name.lower() not in HARMLESS_HEADERS and _is_literal(value)


def _is_literal(value: str) -> bool:
    return bool(value.strip()) and not references(value)


def _secrets_of_url(text: str) -> Iterator[str]:
    for found in _USERINFO.finditer(text):
        user, _, password = found["secret"].partition(":")
        yield from (part for part in (password or user,) if _is_literal(part) and part != MASK)
    for start, stop in _secret_parameters(text):
        if _is_literal(text[start:stop]) and text[start:stop] != MASK:
            yield text[start:stop]


def _secret_parameters(text: str) -> Iterator[tuple[int, int]]:
    """Where the values of URLs' query parameters stand whose names are those of secrets."""
    behind = 0
    for found in _PARAMETER.finditer(text):
        is_new = found.start() >= behind and not found["secret"].startswith(MASK)
        if is_new and is_secret_name(found["name"]):
            behind = found.end("secret")
            yield found.start("secret"), behind


def _mask_literal(secret: str) -> str:
    """`${NAME}` says where the secret is, and is none."""
    return secret if references(secret) else MASK


def _join(at: str, key: str) -> str:
    return f"{at}.{key}" if at else key
