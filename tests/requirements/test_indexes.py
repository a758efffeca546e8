"""What pip is configured with reaches uv, and no credentials are shown."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from requirements.indexes import (
    Settings,
    parse_config_list,
    pip_environment,
    read_pip_settings,
    redact,
    uv_arguments,
    uv_environment,
)

SECRET = "https://user:s3cret@pypi.example/simple"


def test_pips_own_words_with_its_own_precedence() -> None:
    """As `pip config list` prints a file with two sections and two variables."""
    listed = parse_config_list(
        ":env:.find-links='/nowhere/at/all https://wheels.example/'\n"
        "global.extra-index-url='https://a.example/simple https://b.example/simple'\n"
        "global.find-links='/opt/replaced'\n"
        f"global.index-url='{SECRET}'\n"
        "install.trusted-host='pypi.example\\nother.example'\n"
    )
    assert listed["install.trusted-host"] == "pypi.example\nother.example"
    assert listed["global.index-url"] == SECRET


def test_files_and_variables_of_the_real_pip(tmp_path: Path) -> None:
    """A variable replaces what a file says under its name; folders that are not there are left out."""
    (tmp_path / "wheels").mkdir()
    file = tmp_path / "pip.conf"
    file.write_text(
        f"[global]\nindex-url = {SECRET}\nextra-index-url =\n    https://a.example/simple\n    https://b.example/simple\n"
        f"find-links = {tmp_path}/replaced\ncert = /etc/a.pem\ntimeout = 77\n"
        "[install]\ntrusted-host = pypi.example\n[download]\nno-index = true\n"
    )
    environment = {
        "PATH": "/usr/bin:/bin",
        "PIP_CONFIG_FILE": str(file),
        "PIP_FIND_LINKS": f"{tmp_path}/wheels {tmp_path}/missing https://wheels.example/",
        "HOME": str(tmp_path),
        "XDG_CONFIG_DIRS": str(tmp_path),
    }
    settings = read_pip_settings([sys.executable, "-m", "pip"], environment)
    assert settings.default_index == SECRET
    assert settings.extra_indexes == ("https://a.example/simple", "https://b.example/simple")
    assert settings.find_links == (f"{tmp_path}/wheels", "https://wheels.example/")
    assert settings.trusted_hosts == ("pypi.example",) and settings.timeout == "77"
    assert settings.cert == "/etc/a.pem" and not settings.no_index  # [download] is not [install]


def test_variables_count_where_there_is_no_pip() -> None:
    settings = read_pip_settings(None, {"PIP_INDEX_URL": SECRET, "PIP_NO_INDEX": "1", "OTHER": "x"})
    assert settings == Settings(default_index=SECRET, no_index=True)


def test_uv_gets_them_in_its_environment_and_what_the_user_set_for_uv_stays() -> None:
    settings = Settings(
        default_index=SECRET,
        extra_indexes=("https://a.example/simple", "https://b.example/simple"),
        find_links=("/opt/wheels", "https://wheels.example/"),
        no_index=True,
        trusted_hosts=("pypi.example",),
        cert="/etc/a.pem",
        proxy="http://proxy.example:3128",
        timeout="77",
    )
    env = uv_environment(settings, {"UV_HTTP_TIMEOUT": "5", "UV_TORCH_BACKEND": "cu130", "PYTHONPATH": "/x"})
    assert env == {
        "UV_HTTP_TIMEOUT": "5",
        "UV_DEFAULT_INDEX": SECRET,
        "UV_INDEX": "https://a.example/simple https://b.example/simple",
        "UV_FIND_LINKS": "/opt/wheels,https://wheels.example/",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_INSECURE_HOST": "pypi.example",
        "SSL_CERT_FILE": "/etc/a.pem",
        "HTTPS_PROXY": "http://proxy.example:3128",
        "HTTP_PROXY": "http://proxy.example:3128",
    }
    assert uv_arguments(settings) == ["--no-index"] and not [
        a for a in uv_arguments(settings) if "s3cret" in a
    ]
    own = uv_environment(Settings(default_index=SECRET), {"UV_INDEX_URL": "https://mine.example/simple"})
    assert "UV_DEFAULT_INDEX" not in own


def test_pip_installs_into_the_environment_and_nowhere_else() -> None:
    env = pip_environment({"PIP_USER": "1", "PIP_TARGET": "/x", "PYTHONPATH": "/y", "PIP_INDEX_URL": SECRET})
    assert env == {"PIP_INDEX_URL": SECRET, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (
            f"Looking in indexes: {SECRET}, file:///opt",
            "Looking in indexes: https://***@pypi.example/simple, file:///opt",
        ),
        ("error (https://t0ken@a.example/x)", "error (https://***@a.example/x)"),
        ("https://a.example/x.whl?sig=abc#sha256=0", "https://a.example/x.whl?***"),
        ("https://user:p@ss@a.example/", "https://***@a.example/"),
        ("deepspeed @ file:///opt/x", "deepspeed @ file:///opt/x"),
    ],
)
def test_credentials_are_not_shown(text: str, shown: str) -> None:
    assert redact(text) == shown
