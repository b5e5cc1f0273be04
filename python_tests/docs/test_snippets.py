"""The code in the README and in the pages of docs/ runs, and its commands are understood."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from pages import PAGES, ROOT, Block, blocks, prose

from sparsekern.cli.command import _parser

# What a fence may say: code that runs, commands, output or other libraries' code, the site's own.
LANGUAGES = {"python", "sh", "text", "{toctree}", "{eval-rst}"}
PROGRAMS = {"python3 -m venv", ". .venv/bin/activate", "pytest", "sphinx-build", "pre-commit"}
FOLDERS = ("bench", "csrc", "docs", "examples", "python_tests", "sparsekern", ".ci")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def with_blocks(language: str) -> list[Path]:
    return [page for page in PAGES if any(block.language == language for block in blocks(page))]


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_block_says_what_it_is(page):
    assert {block.language for block in blocks(page)} <= LANGUAGES


@pytest.mark.parametrize("page", with_blocks("python"), ids=name)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch, one_thread):
    """One program a page, as a reader would type it, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    variables = {"__name__": "__main__"}
    for block in blocks(page):
        if block.language == "python":
            code = "\n" * (block.line - 1) + block.code  # so that a traceback names the line
            exec(compile(code, str(page), "exec"), variables)


def commands(block: Block) -> list[str]:
    """The single commands of a block, without comments."""
    lines = (re.sub(r"(^|\s)#.*", "", line) for line in block.code.splitlines())
    return [part.strip() for line in lines for part in line.split("&&") if part.strip()]


def extras() -> set[str]:
    text = (ROOT / "pyproject.toml").read_text()
    section = text.split("[project.optional-dependencies]")[1].split("\n[")[0]
    return set(re.findall(r"^(\w+) =", section, re.MULTILINE))


def check_pip(words: list[str]) -> None:
    """`pip install` or `pip wheel` of this folder, with extras that exist."""
    assert words[0] in ("install", "wheel", "uninstall"), words
    for word in words[1:]:
        if "[" in word:
            assert set(word.partition("[")[2].rstrip("]").split(",")) <= extras(), word


def check_script(words: list[str]) -> None:
    """`python FILE FLAGS` where the file exists and knows the flags."""
    text = (ROOT / words[0]).read_text()
    for word in words[1:]:
        assert not word.startswith("--") or f'"{word}"' in text, f"{words[0]} has no {word}"


def check_command(command: str) -> None:
    words = shlex.split(command)
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    if words[0] == "torchrun" and "sparsekern" in words:
        words = words[words.index("sparsekern") :]
    if words[0] == "sparsekern":
        _parser().parse_args(words[1:])
    elif words[0] == "pip":
        check_pip(words[1:])
    elif words[0] == "python" and words[1] != "-m":
        check_script(words[1:])
    elif words[0].startswith(("bench/", ".ci/")):
        assert (ROOT / words[0]).is_file(), command
    else:
        assert command.startswith(tuple(PROGRAMS)), command


@pytest.mark.parametrize("page", with_blocks("sh"), ids=name)
def test_the_commands_of_a_page_are_understood(page):
    for block in blocks(page):
        if block.language == "sh":
            for command in commands(block):
                try:
                    check_command(command)
                except SystemExit:
                    pytest.fail(f"{name(page)}, line {block.line}: {command} has wrong flags")


@pytest.mark.parametrize("command", ["sparsekern train sae --no-such-flag", "pip install '.[x]'"])
def test_a_wrong_command_is_noticed(command):
    with pytest.raises((SystemExit, AssertionError)):
        check_command(command)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_that_a_page_names_exist(page):
    spans = re.findall(r"`([^`\n]+)`", prose(page))
    places = [span for span in spans if span.startswith(tuple(f"{f}/" for f in FOLDERS))]
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", prose(page))
    missing = [place for place in places if "<" not in place and not any(ROOT.glob(place))]
    missing += [link for link in links if not (page.parent / link).exists()]
    assert not missing
