# SPDX-License-Identifier: Apache-2.0
"""The guide is true: its blocks run, its pages equal the source, its links lead somewhere."""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

pytest.importorskip("trl")

import trl  # noqa: E402
from markdown_blocks import runnable  # noqa: E402

from fastgrpo.cli import main  # noqa: E402
from fastgrpo.models import families  # noqa: E402
from fastgrpo.rewards.core import registry  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
RUN = [page for page in PAGES if any(runnable(page.read_text("utf-8")))]


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_marked_blocks_run_in_their_order(page, tmp_path, monkeypatch, capsys):
    """Those of a page share a folder and their names, as a reader who follows it would."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry, "_SPECS", dict(registry._SPECS))  # a page's rewards are its own
    names: dict = {"__name__": "guide"}
    for block in runnable(page.read_text("utf-8")):
        if block.file is not None:
            Path(block.file).write_text(block.text)
        elif block.language == "bash":
            for line in block.text.replace("\\\n", " ").splitlines():
                program, *arguments = shlex.split(line, comments=True)
                assert program == "fastgrpo", f"{page.name}:{block.line}: {line}"
                main(arguments)
        else:
            source = "\n" * block.line + block.text  # tracebacks name the page's own lines
            exec(compile(source, str(page), "exec"), names)
    for name in [name for name in sys.modules if name.startswith("my_")]:
        del sys.modules[name]


def test_every_guide_page_that_shows_a_first_step_is_run():
    assert {page.stem for page in RUN} >= {"start", "packed_row", "rewards", "migration", "scaling"}


@pytest.mark.skipif(not trl.__version__.startswith("1.16"), reason="TRL's fields of 1.16")
def test_the_settings_page_equals_the_dataclasses():
    from fastgrpo.cli.reference import page

    assert (DOCS / "settings.md").read_text("utf-8") == page(), "run `make guide`"


def test_every_refusal_has_a_topic_and_stands_on_the_page():
    messages = load("messages")
    topics, lost = messages.sorted_out()
    assert not lost, f"no topic of docs/remedies.toml fits these: {lost}"
    page = (DOCS / "troubleshooting.md").read_text("utf-8")
    shown = set(page.splitlines())
    missing = [text for _, texts in topics for text in texts if text not in shown]
    assert not missing, f"run `make guide`: {missing}"
    assert sum(len(texts) for _, texts in topics) > 300
    for topic, _ in topics:
        remedy = topic["remedy"].strip()
        assert remedy and remedy in page, topic["title"]


def test_messages_are_found_in_every_form_they_are_raised_in(tmp_path, monkeypatch):
    messages = load("messages")
    (tmp_path / "fastgrpo").mkdir()
    (tmp_path / "fastgrpo" / "a.py").write_text(
        'raise InputError("plain")\n'
        'raise errors.InputError(f"{name}: of {x!r} rows")\n'
        'error = InputError("two " + "parts")\n'
        "raise InputError(str(error))\n"
        'raise ValueError("another")\n'
    )
    monkeypatch.setattr(messages, "ROOT", tmp_path)
    found = [text for _, text in messages.messages()]
    assert found == ["plain", "{...}: of {...} rows", "two parts", "{...}"]
    known = [{"files": ["b/*"]}, {"messages": ["^plain"]}]
    assert messages.topic_of("a.py", "plain", known) is known[1]
    assert messages.topic_of("a.py", "two parts", known) is None


def navigation(entries: list) -> list[str]:
    found = []
    for entry in entries:
        for value in entry.values():
            found += navigation(value) if isinstance(value, list) else [value]
    return found


def test_the_navigation_names_every_page_once():
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    named = navigation(settings["nav"])
    assert sorted(named) == sorted(page.relative_to(DOCS).as_posix() for page in PAGES)
    assert settings["theme"]["font"] is False  # Google's would be fetched by the reader


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {
        re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_links_lead_to_what_is_there(page):
    text = page.read_text("utf-8")
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_file() and DOCS in file.parents, f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(file.read_text("utf-8")), f"{page.name}: {target}"


def test_the_api_pages_name_what_can_be_imported():
    for page in (DOCS / "api").glob("*.md"):
        for name in re.findall(r"^::: (\S+)$", page.read_text("utf-8"), re.M):
            owner, _, attribute = name.rpartition(".")
            module = importlib.import_module(owner)
            found = getattr(module, attribute, None) or importlib.import_module(name)
            assert found.__doc__, f"{page.name}: {name} has no docstring"


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_fetches_nothing(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not re.search(r"^WARNING", done.stderr, re.M)
    fetched = re.compile(r"<(?:script|link|img|iframe)\b[^>]*(?:src|href)=\"?(?:https?:)?//[^>]*>")
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > len(PAGES)  # and the page of what is not found
    for page in pages:
        assert not fetched.search(page.read_text("utf-8")), page
    for style in tmp_path.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import)\s*['\"]?https?:", style.read_text("utf-8")), style


def test_the_table_of_families_says_what_the_results_say(tmp_path):
    page = load("families")
    exact, fault = "t.py::test_packed_equals_one_by_one", "t.py::test_the_fault_shows"
    cases = {
        f"{exact}[llama]": {"outcome": "passed", "worst": 3.2e-14},
        f"{fault}[llama-one]": {"outcome": "failed"},
        f"{fault}[llama-two]": {"outcome": "passed"},
        "t.py::test_a_completion_changes_no_other[llama]": {"outcome": "skipped"},
        "t.py::test_order_changes_nothing[llama]": {"outcome": "passed"},
    }
    for version in ("5.17.0", "5.24.0"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "llama.json").write_text(json.dumps(cases))
        cases[f"{exact}[llama]"]["worst"] = 2e-15
    head, _, *rows = (line.strip("| ").split(" | ") for line in page.table(tmp_path).splitlines())
    rows = {row[0]: dict(zip(head, row, strict=True)) for row in rows if len(row) == len(head)}
    assert set(rows) == set(families())
    llama = rows["llama"]
    assert llama["float64"] == "3e-14 / 2e-15" and llama["any order"] == "yes"
    assert llama["faults show"] == "fails" and llama["isolated"] == "not run"
    assert llama["videos"] == "–" and rows["qwen3_vl"]["videos"] == "not run"


def test_results_are_kept_and_what_passed_is_left_out(tmp_path):
    page = load("families")
    passed = {"t.py::test_values[qwen3]": {"outcome": "passed"}}
    (tmp_path / "qwen3.json").write_text(json.dumps(passed))
    names = [("test_values", "qwen3"), ("test_values", "llama"), ("test_x", "llama")]
    names += [("test_errors", "qwen3"), ("test_errors", "llama"), ("test_errors", "mistral")]

    def item(test, family):
        spec = SimpleNamespace(params={"family": family})
        return SimpleNamespace(nodeid=f"t.py::{test}[{family}]", originalname=test, callspec=spec)

    def run(outcomes):
        keeper = page.Keeper(tmp_path, {"llama", "qwen3"})
        keeper.pytest_collection_modifyitems(items := [item(*name) for name in names])
        for each, outcome in zip(items, outcomes, strict=True):
            for when in ("setup", "call", "teardown"):
                called = outcome if when == "call" else "passed"
                report = dict(nodeid=each.nodeid, duration=0.5, when=when, outcome=called)
                keeper.pytest_runtest_logreport(
                    SimpleNamespace(**report, user_properties=[("worst", 1e-9)])
                )
        return [each.nodeid.removeprefix("t.py::test_") for each in items]

    assert run(["passed", "failed", "passed"]) == [
        "values[llama]",
        "errors[llama]",
        "errors[qwen3]",
    ]
    kept = json.loads((tmp_path / "llama.json").read_text())
    assert kept["t.py::test_errors[llama]"] == {"outcome": "failed", "seconds": 1.5, "worst": 1e-9}
    assert run(["skipped"]) == ["errors[llama]"]  # once more
    assert run([]) == []
    assert passed.items() <= json.loads((tmp_path / "qwen3.json").read_text()).items()
