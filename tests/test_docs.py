"""The documentation is true: its code runs, its links resolve, and it misses no command and no module."""

from __future__ import annotations

import contextlib
import os
import pkgutil
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import yaml

import fanal

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
FENCE = re.compile(r"^(?P<indent> *)```(?P<head>[^\n`]*)\n(?P<body>.*?)^(?P=indent)```[ ]*$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^(?:\$ )?(?P<variables>(?:[A-Z_]+=\S+ )*)fanal\b(?P<arguments>.*)$")
LINK = re.compile(r"!?\[[^\]\n]*\]\((?P<target>[^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, its title (a file name), its text, and its first line on the page."""

    language: str
    title: str | None
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    source = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(source):
        indent = len(match["indent"])
        text = "\n".join(line[indent:] for line in match["body"].splitlines()) + "\n"
        language, _, rest = match["head"].strip().partition(" ")
        title = re.search(r'title="([^"]+)"', rest)
        found.append(Block(language, title and title[1], text, source.count("\n", 0, match.start()) + 2))
    return found


def commands(block: Block) -> list[str]:
    """The lines of a shell block that call fanal, continued lines joined."""
    lines = block.text.replace("\\\n", " ").splitlines() if block.language in ("bash", "console") else []
    return [line for line in lines if COMMAND.match(line)]


def runnable(page: Path) -> bool:
    return any(block.language == "python" or commands(block) for block in blocks(page))


@contextlib.contextmanager
def variables(text: str):
    """Set the variables that stand in front of a command; PYTHONPATH reaches the import path as it would."""
    values = dict(word.split("=", 1) for word in text.split())
    before, path = {name: os.environ.get(name) for name in values}, list(sys.path)
    os.environ.update(values)
    if "PYTHONPATH" in values:
        sys.path[:0] = [str(Path(part).resolve()) for part in values["PYTHONPATH"].split(":")]
    try:
        yield
    finally:
        sys.path[:] = path
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)


def run_command(line: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Call the installed program's entry point, in this process: importing torch anew for each line costs seconds."""
    match = COMMAND.match(line)
    assert match is not None
    (program,) = entry_points(group="console_scripts", name="fanal")
    monkeypatch.setattr(sys, "argv", ["fanal", *shlex.split(match["arguments"], comments=True)])
    with variables(match["variables"]), pytest.raises(SystemExit) as exit_:
        program.load()()
    assert exit_.value.code in (0, None), f"{where}: `{line}` ended with status {exit_.value.code}"


@pytest.mark.parametrize("page", [p for p in PAGES if runnable(p)], ids=lambda p: str(p.relative_to(ROOT)))
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python and `fanal` lines run in the order of the page, in one namespace and one folder.

    A block with a title is also written to the file of that name, for the blocks after it.
    """
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__docs__"}
    modules = set(sys.modules)
    for block in blocks(page):
        where = f"{page.relative_to(ROOT)}:{block.line}"
        if block.title:
            assert Path(block.title).name == block.title, f"{where}: a title must be a plain file name"
            (tmp_path / block.title).write_text(block.text, encoding="utf-8")
        if block.language == "python":
            code = compile("\n" * (block.line - 1) + block.text, str(page), "exec", dont_inherit=True)
            exec(code, namespace)
        for line in commands(block):
            run_command(line, where, monkeypatch)
    for name in set(sys.modules) - modules:  # modules that a page wrote
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def test_a_false_block_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runner itself can fail: on an assertion, and on a command that does not exist."""
    page = ROOT / "README.md"
    block = Block("python", None, "assert 1 == 2\n", 1)
    monkeypatch.setattr(sys.modules[__name__], "blocks", lambda _: [block])
    with pytest.raises(AssertionError):
        test_blocks_run(page, tmp_path, monkeypatch)
    with pytest.raises(AssertionError, match="status 2"):
        run_command("fanal sample no-such-model", "here", monkeypatch)


def test_the_installed_program_starts() -> None:
    program = Path(sys.executable).with_name("fanal")
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == fanal.__version__


def test_readme_keeps_its_promise() -> None:
    """The sentence that says what a denoiser is by line 20, ten lines of Python by line 30."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    sentence = "a denoiser is any function `D(x, sigma) ≈ E[x0 | x0 + sigma·n = x]`"
    assert sentence in " ".join(lines[:20])
    first = next(block for block in blocks(ROOT / "README.md") if block.language == "python")
    code = [line for line in first.text.splitlines() if line.strip()]
    assert first.line <= 20
    assert first.line + len(first.text.splitlines()) - 1 <= 30
    assert 8 <= len(code) <= 12


def nav() -> list[str]:
    def leaves(node: object) -> list[str]:
        if isinstance(node, str):
            return [node]
        parts = node.values() if isinstance(node, dict) else node
        return [leaf for part in parts for leaf in leaves(part)]  # pyright: ignore

    return leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])


def test_every_command_has_a_page() -> None:
    from typer.main import get_command

    from fanal.cli import app

    names = sorted(get_command(app).commands)  # pyright: ignore
    assert [name for name in names if f"commands/{name}.md" not in nav()] == []
    for name in names:
        page = (DOCS / "commands" / f"{name}.md").read_text(encoding="utf-8")
        assert f"fanal {name}" in page
        options = {o for p in get_command(app).commands[name].params for o in p.opts if o.startswith("--")}  # pyright: ignore
        missing = sorted(option for option in options - {"--help"} if option not in page)
        assert missing == [], f"commands/{name}.md does not mention {missing}"


def test_every_public_module_has_an_api_page() -> None:
    names = [m.name for m in pkgutil.iter_modules(fanal.__path__) if not m.name.startswith("_") and m.name != "cli"]
    assert len(names) > 15
    for name in names:
        assert f"api/{name}.md" in nav()
        assert f"::: fanal.{name}" in (DOCS / "api" / f"{name}.md").read_text(encoding="utf-8")


def test_nav_and_pages_are_the_same() -> None:
    assert sorted(nav()) == sorted(str(p.relative_to(DOCS)) for p in DOCS.rglob("*.md"))


def anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[\s_]+", "-", re.sub(r"[^\w\s-]", "", head.lower().replace("`", "")).strip()) for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_resolve(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for match in LINK.finditer(text):
        target, _, anchor = match["target"].partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = page if not target else (page.parent / target).resolve()
        assert file.exists(), f"{page.name}: {match[0]} leads nowhere"
        if DOCS in page.parents:
            assert DOCS in file.parents or file == page, f"{page.name}: {match[0]} leads out of the site"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{page.name}: {match[0]}: no such heading"


def test_pictures_are_small_and_used() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for picture in (DOCS / "images").iterdir():
        assert picture.stat().st_size <= 150 * 1024
        assert f"images/{picture.name}" in text


def test_citation_is_valid() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors", "type", "version", "license"} <= citation.keys()
    assert (citation["type"], citation["version"]) == ("software", fanal.__version__)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert citation["license"] == project["license"]
    for reference in citation["references"]:
        assert {"type", "title", "authors", "year"} <= reference.keys()
    assert f"## {fanal.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_figures_under_the_first_block_are_what_it_prints(capsys):
    page = ROOT / "README.md"
    exec(next(block for block in blocks(page) if block.language == "python").text, {})
    few, many = re.findall(r": (\d+) of 600", capsys.readouterr().out)
    words = " ".join(page.read_text(encoding="utf-8").split())
    assert f"ten coarse steps leave {few} of 600 samples" in words
    assert f"forty leave {many}." in words
