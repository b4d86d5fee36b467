"""Build the book: execute the chapters, then render them to one site.

In: `_toc.yml`, `_config.yml`, `book/`, `results/`. Out: the table of runs
and the claims in `results/`, and `_build/html/index.html`.
Execution and rendering are apart, so what is rendered is exactly what was
executed, and a chapter whose inputs are unchanged is not executed again.
"""

import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.resources import files
from pathlib import Path

import click
from nbformat import NotebookNode
from sphinx_external_toc.parsing import parse_toc_yaml

import evidence
from bnnlib.errors import unknown_name
from bnnlib.interactive import PARTS
from bnnlib.process import cores
from bnnlib.runs.interrupts import signals_to
from execute import (
    CELL_TIMEOUT,
    BookError,
    chapter_key,
    execute,
    failed_copy,
    inputs_digest,
    kernels_at,
    profile_parameters,
    stored_key,
)
from notebooks import execution_content, merge, read, write
from together import Progress, run_together

ROOT = Path(__file__).resolve().parents[1]
# They time what they compute, which is slower while other chapters run; so
# they run at the end, one after the other.
TIMED = ("book/11_bits", "book/intro", "book/performance")
PAGES = shutil.ignore_patterns("*.ipynb", "*.py", "*.toml", ".*", "__*__")
MATHJAX = ("es5/tex-svg.js", "LICENSE")  # in the package `mathjax`


def contents(root: Path) -> list[str]:
    """The names in `_toc.yml`, such as `book/intro`, in reading order."""
    names = list(parse_toc_yaml(root / "_toc.yml"))
    for name in names:
        if not any(_source(root, name, kind) for kind in ("ipynb", "md")):
            raise BookError(f"_toc.yml names {name}; there is no such file")
    return names


def chapters(root: Path, only: Sequence[str] = ()) -> list[str]:
    """The notebooks of `_toc.yml`; `only` those with one of these names."""
    names = [n for n in contents(root) if _source(root, n, "ipynb")]
    short = {name.rpartition("/")[2]: name for name in names}
    for wanted in only:
        if wanted not in short:
            raise BookError(str(unknown_name("chapter", wanted, short)))
    return [name for key, name in short.items() if not only or key in only]


def execute_chapters(
    root: Path,
    profile: str,
    names: Sequence[str],
    force: bool = False,
    jobs: int = 1,
) -> None:
    """Execute each chapter whose key has changed, `jobs` side by side.

    Prints a line for each.
    """
    inputs, progress, work = inputs_digest(root), Progress(names), {}
    for name in names:
        chapter, out = root / f"{name}.ipynb", _stored(root, profile, name)
        given = profile_parameters(chapter, profile)
        key = chapter_key(read(chapter), given, inputs)
        if stored_key(out) == key and not force:
            progress.finished(name, "kept")
        else:
            timeout = CELL_TIMEOUT[profile]
            work[name] = partial(execute, chapter, out, given, timeout, key)
    timed = {name: work.pop(name) for name in TIMED if name in work}
    try:
        with kernels_at(root / "book"):
            # backwards, as the first chapters are the shortest: at the end
            # no core has to wait for a long one
            run_together(dict(reversed(work.items())), jobs, progress)
            run_together(timed, 1, progress)
    except KeyboardInterrupt:
        for name in work | timed:
            failed_copy(_stored(root, profile, name)).unlink(
                missing_ok=True
            )
        raise


def stage(root: Path, profile: str) -> Path:
    """Copy what Sphinx reads to `_build/book_src`, and return that."""
    target = root / "_build" / "book_src"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(root / "book", target / "book", ignore=PAGES)
    (target / "book" / "_static").rename(target / "_static")
    for name in ("_config.yml", "_toc.yml"):
        shutil.copy(root / name, target)
    for name in chapters(root):
        today = read(root / f"{name}.ipynb")
        executed = read(_stored(root, profile, name))
        write(_page(today, executed), target / f"{name}.ipynb")
    for path in map((root / "results").joinpath, evidence.FILES):
        shutil.copy(path, target / "book")
    _copy_scripts(target / "extra")
    return target


def render(root: Path, source: Path) -> Path:
    """Render the staged book; any Sphinx warning raises `BookError`.

    The site replaces `_build/html` only when it is whole.
    """
    output = root / "_build" / "render"
    shutil.rmtree(output, ignore_errors=True)
    program = Path(sys.executable).with_name("jupyter-book")
    options = ["--all", "-W", "-n", "--keep-going"]
    command = [program, "build", source, *options, "--path-output", output]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BookError(_sphinx_report(root, source, done))
    site = output / "_build" / "html"
    check_pages(site, contents(root))
    final = root / "_build" / "html"
    shutil.rmtree(final, ignore_errors=True)
    site.rename(final)
    shutil.rmtree(output)
    return final / "index.html"


def check_pages(site: Path, names: Sequence[str]) -> None:
    """Raise `BookError` unless the site has a page for each name."""
    pages = ["index", *names]
    missing = [n for n in pages if not (site / f"{n}.html").is_file()]
    if missing:
        raise BookError(f"no page was made for {', '.join(missing)}")


@click.command()
@click.option(
    "--profile",
    type=click.Choice(list(CELL_TIMEOUT)),
    default="quick",
    show_default=True,
    help="Size of the runs in the chapters.",
)
@click.option(
    "--only",
    multiple=True,
    metavar="NAME",
    help="Execute this chapter alone, render nothing; may be repeated.",
)
@click.option(
    "--force", is_flag=True, help="Execute the unchanged ones too."
)
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    default=cores,
    show_default="the cores",
    help="How many chapters to execute side by side, with a thread each.",
)
def main(
    profile: str, only: tuple[str, ...], force: bool, jobs: int
) -> None:
    """Execute the chapters and render the book to _build/html."""
    try:
        with signals_to(signal.default_int_handler):  # SIGTERM too
            names = chapters(ROOT, only)
            if not only:
                evidence.write(ROOT / "results")
            execute_chapters(ROOT, profile, names, force, jobs)
            if only:
                return
            with _timed("rendering"):
                page = render(ROOT, stage(ROOT, profile))
            click.echo(f"The book: {page}")
    except KeyboardInterrupt:
        click.echo("Stopped; the chapters executed so far are kept.")
        sys.exit(130)


def _page(today: NotebookNode, executed: NotebookNode) -> NotebookNode:
    if execution_content(today) == execution_content(executed):
        return merge(today, executed)
    return executed  # its code was edited since; the next build executes it


def _copy_scripts(extra: Path) -> None:
    # Not below _static: every script there is loaded by every page.
    mathjax = files("mathjax") / "static" / "mathjax"
    bokeh = files("bokeh") / "server" / "static" / "js"
    scripts = [(mathjax / name, extra / "mathjax") for name in MATHJAX]
    served = extra / "bokeh" / "static" / "js"  # as by Bokeh's own server
    scripts += [(bokeh / f"{part}.min.js", served) for part in PARTS]
    for source, folder in scripts:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / source.name).write_bytes(source.read_bytes())


def _source(root: Path, name: str, kind: str) -> bool:
    return (root / f"{name}.{kind}").is_file()


def _stored(root: Path, profile: str, name: str) -> Path:
    return root / "_build" / "executed" / profile / f"{name}.ipynb"


def _sphinx_report(
    root: Path, source: Path, done: subprocess.CompletedProcess
) -> str:
    log = root / "_build" / "render.log"
    log.write_text(done.stdout + done.stderr, encoding="utf-8")
    lines = done.stderr.replace(f"{source}/", "").splitlines()
    found = [line for line in lines if "WARNING" in line or "ERROR" in line]
    report = "\n".join(found or lines[-20:])
    return f"the book does not render\n{report}\nAll of the output: {log}"


@contextmanager
def _timed(label: str) -> Iterator[None]:
    """Print a label and how long it took; a terminal also sees it count."""
    start = time.monotonic()
    finished = threading.Event()
    line = f"\r{label}" if sys.stdout.isatty() else ""

    def count() -> None:
        while line and not finished.wait(1):
            seconds = time.monotonic() - start
            click.echo(f"{line} {seconds:6.0f} s", nl=False)

    click.echo(label, nl=False)
    clock = threading.Thread(target=count, daemon=True)
    clock.start()
    try:
        yield
        finished.set()
        click.echo(f"{line} {time.monotonic() - start:6.1f} s")
    except BaseException:
        finished.set()
        click.echo()
        raise


if __name__ == "__main__":
    main()
