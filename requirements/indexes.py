"""Where packages come from: what pip is configured with, handed to uv, which does not read pip's files.

Everything goes to uv through its environment, never its command line: index URLs may hold credentials, and
other users can read command lines.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

PIP_DEADLINE_SECONDS = 300  # of a machine that is busy otherwise
# Settings of a user's own uv projects that would change what the lock means.
FOREIGN_UV = (
    "UV_TORCH_BACKEND",
    "UV_EXCLUDE_NEWER",
    "UV_CONSTRAINT",
    "UV_OVERRIDE",
    "UV_EXCLUDE",
    "UV_BUILD_CONSTRAINT",
    "UV_REQUIRE_HASHES",
    "UV_NO_BUILD",
    "UV_NO_BINARY",
    "UV_NO_BUILD_ISOLATION",
    "UV_SYSTEM_PYTHON",
    "UV_RESOLUTION",
    "UV_PRERELEASE",
    "UV_PROJECT",
    "UV_WORKING_DIR",
    "UV_TARGET",
    "UV_PREFIX",
)
FOREIGN_PIP = ("PIP_USER", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_REQUIRE_HASHES", "PIP_NO_DEPS")
# Other packages than the environment's.
FOREIGN_PYTHON = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")


class Settings(NamedTuple):
    """What of pip's configuration says where packages are and how to reach them.

    >>> Settings(default_index="https://pypi.example/simple", find_links=("/opt/wheels",)).locations
    ('/opt/wheels', 'https://pypi.example/simple')
    """

    default_index: str | None = None  # None: pip's own default, which is uv's too
    extra_indexes: tuple[str, ...] = ()
    find_links: tuple[str, ...] = ()
    no_index: bool = False
    trusted_hosts: tuple[str, ...] = ()
    cert: str | None = None
    client_cert: str | None = None
    proxy: str | None = None
    timeout: str | None = None  # seconds
    keyring: str | None = None

    @property
    def locations(self) -> tuple[str, ...]:
        """The places besides the default index, and that one where it is set."""
        return (*self.find_links, *self.extra_indexes, *([self.default_index] if self.default_index else []))


def read_pip_settings(pip: Sequence[str] | None, environment: Mapping[str, str] | None = None) -> Settings:
    """Of `pip config list`, run as the command `pip`: files and PIP_* variables. Without pip, the variables.

    Raises `RuntimeError` where pip cannot read its own configuration.
    """
    environment = os.environ if environment is None else environment
    if pip is None:
        prefix = "PIP_"
        listed = {
            f":env:.{name.removeprefix(prefix).lower().replace('_', '-')}": value
            for name, value in environment.items()
            if name.startswith(prefix)
        }
        return _settings(listed)
    command = [*pip, "--disable-pip-version-check", "config", "list"]
    done = subprocess.run(
        command, env=dict(environment), capture_output=True, text=True, timeout=PIP_DEADLINE_SECONDS
    )
    if done.returncode:
        raise RuntimeError(f"pip cannot read its configuration: {redact(done.stderr.strip())}")
    return _settings(parse_config_list(done.stdout))


def parse_config_list(text: str) -> dict[str, str]:
    """`section.key='value'` per line, as pip writes them.

    >>> parse_config_list("global.find-links='/opt/wheels'")
    {'global.find-links': '/opt/wheels'}
    """
    found: dict[str, str] = {}
    for line in text.splitlines():
        name, separator, value = line.partition("=")
        if separator and "." in name:
            found[name.strip().replace("_", "-")] = str(ast.literal_eval(value.strip()))
    return found


def _settings(listed: Mapping[str, str]) -> Settings:
    """As pip reads them: `[install]` before `[global]`, variables before both; one replaces another whole."""
    merged: dict[str, str] = {}
    for section in ("global", "install", ":env:"):
        for name, value in listed.items():
            where, _, key = name.rpartition(".")
            if where == section and value.strip():
                merged[key] = value
    words = {key: tuple(value.split()) for key, value in merged.items()}
    places = tuple(os.path.expanduser(place) for place in words.get("find-links", ()))
    return Settings(
        default_index=merged.get("index-url", merged.get("pypi-url")),
        extra_indexes=words.get("extra-index-url", ()),
        find_links=tuple(
            place for place in places if "://" in place or Path(place).exists()
        ),  # as pip: with a warning
        no_index=merged.get("no-index", "").lower() in ("1", "true", "yes", "on", "y", "t"),
        trusted_hosts=words.get("trusted-host", ()),
        cert=merged.get("cert"),
        client_cert=merged.get("client-cert"),
        proxy=merged.get("proxy"),
        timeout=merged.get("timeout", merged.get("default-timeout")),
        keyring=merged.get("keyring-provider"),
    )


def uv_environment(settings: Settings, environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` with pip's settings in uv's variables. What the user has set for uv stays as it is."""
    env = {name: value for name, value in environment.items() if name not in FOREIGN_UV + FOREIGN_PYTHON}
    wanted = {
        "UV_DEFAULT_INDEX": settings.default_index,
        "UV_INDEX": " ".join(settings.extra_indexes),
        "UV_FIND_LINKS": ",".join(settings.find_links),
        "UV_INDEX_STRATEGY": "unsafe-best-match",  # the best of all indexes, as pip does
        "UV_INSECURE_HOST": " ".join(settings.trusted_hosts),
        "SSL_CERT_FILE": settings.cert,
        "SSL_CLIENT_CERT": settings.client_cert,
        "UV_HTTP_TIMEOUT": settings.timeout,
        "UV_KEYRING_PROVIDER": "subprocess" if settings.keyring in ("subprocess", "import") else None,
    }
    if "UV_INDEX_URL" in env:
        del wanted["UV_DEFAULT_INDEX"]
    if "UV_EXTRA_INDEX_URL" in env:
        del wanted["UV_INDEX"]
    if settings.proxy:
        wanted |= {"HTTPS_PROXY": settings.proxy, "HTTP_PROXY": settings.proxy}
    for name, value in wanted.items():
        if value and name not in env:
            env[name] = value
    return env


def uv_arguments(settings: Settings) -> list[str]:
    """What uv has no variable for."""
    return ["--no-index"] if settings.no_index else []


def pip_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` without what would make pip install elsewhere or otherwise than the lock says."""
    env = {name: value for name, value in environment.items() if name not in FOREIGN_PIP + FOREIGN_PYTHON}
    return env | {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}


def redact(text: str) -> str:
    """Without the user names, passwords and tokens of URLs.

    >>> redact("https://user:secret@pypi.example/simple?token=1")
    'https://***@pypi.example/simple?***'
    """
    text = re.sub(r"(?<=://)[^/\s'\"]*@", "***@", text)
    return re.sub(r"(://[^\s?'\"]*\?)[^\s'\"]+", r"\1***", text)
