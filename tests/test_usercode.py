"""User files that import modules next to them, locally and where only their source text is available."""

from __future__ import annotations

import asyncio
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest

from rayrlhf.isolation.frames import CodeError
from rayrlhf.isolation.output import OutputLog
from rayrlhf.isolation.pool import ProcessPool
from rayrlhf.isolation.process import Hosted
from rayrlhf.usercode import UserCode, find_user_code

REWARD = """
import helper
from words import lists

def score(responses):
    from late import BONUS  # within the function
    return [helper.value + lists.LENGTH + BONUS for _ in responses]
"""


def write(folder: Path, files: dict[str, str]) -> str:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return f"{folder / 'reward.py'}:score"


def make_folder(folder: Path, value: float) -> str:
    return write(
        folder,
        {
            "reward.py": REWARD,
            "helper.py": f"import deeper\nvalue = deeper.value + {value}",
            "deeper.py": "value = 100.0",
            "late.py": "BONUS = 0.5",
            "words/__init__.py": "",
            "words/lists.py": "from .size import LENGTH",
            "words/size.py": "LENGTH = 10",
            "unrelated.py": "raise AssertionError",
        },
    )


def score(*codes: UserCode) -> list[Any]:
    async def main() -> list[Any]:
        scores = []
        for code in codes:
            hosted = Hosted("rayrlhf.reward.function_host:FunctionHost", (code,), 60, 60)
            async with ProcessPool(hosted, OutputLog("reward0")) as pool:
                scores.append(await pool.call("score", {"responses": ["a"]}, 1))
        return scores

    return asyncio.run(main())


def test_a_file_imports_those_next_to_it(tmp_path: Path) -> None:
    assert score(find_user_code(make_folder(tmp_path, 1.0), "function")) == [[111.5]]


def test_helpers_of_one_name_do_not_collide(tmp_path: Path) -> None:
    codes = [find_user_code(make_folder(tmp_path / str(n), n), "function") for n in (1, 2)]
    assert score(*codes) == [[111.5], [112.5]]


def test_what_it_imports_travels_with_it(tmp_path: Path) -> None:
    """As on another node, which has no such folder."""
    code = find_user_code(make_folder(tmp_path / "driver", 1.0), "function")
    shutil.rmtree(tmp_path / "driver")
    assert score(pickle.loads(pickle.dumps(code))) == [[111.5]]
    carried = [each.module for each in code.carried_modules]
    assert sorted(carried) == ["deeper", "helper", "late", "words", "words.lists", "words.size"]


def test_a_run_keeps_the_code_that_it_began_with(tmp_path: Path) -> None:
    code = find_user_code(make_folder(tmp_path, 1.0), "function")
    (tmp_path / "helper.py").write_text("value = 0.0")
    assert score(code) == [[111.5]], "a replica that restarts scores as before"


def test_data_next_to_a_file_is_found(tmp_path: Path) -> None:
    text = write(
        tmp_path,
        {
            "reward.py": "from pathlib import Path\nimport bonus\n"
            "here = Path(__file__).with_name('b.txt')\n"
            "def score(responses): return [bonus.read() + float(here.read_text())]",
            "bonus.py": "from pathlib import Path\n"
            "def read(): return float(Path(__file__).with_name('a.txt').read_text())",
            "a.txt": "1",
            "b.txt": "2",
        },
    )
    assert score(find_user_code(text, "function")) == [[3.0]]


def test_an_error_in_a_file_next_to_it_names_the_line(tmp_path: Path) -> None:
    text = write(
        tmp_path,
        {
            "reward.py": "import helper\ndef score(responses): return helper.f()",
            "helper.py": "def f():\n    return 1 / 0",
        },
    )
    with pytest.raises(CodeError, match=r"ZeroDivisionError: division by zero \(reward.py:2\)"):
        score(find_user_code(text, "function"))
