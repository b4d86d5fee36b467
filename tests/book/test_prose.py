"""The words of every page: known to a dictionary or to `words.txt`, and British.

The dictionary is American and knows no terms of the field; what it lacks stands in the project's
own list, in lower case unless it is a name. Left out are code, mathematics, what roles point to,
citations, addresses and file names.
"""

import re
from functools import cache
from pathlib import Path

import pytest
from notebooks import read
from spellchecker import SpellChecker

ROOT = Path(__file__).parents[2]
LIST = Path(__file__).with_name("words.txt")
BOOK = [*ROOT.glob("book/*.ipynb"), *ROOT.glob("book/*.md")]
PAGES = sorted([*BOOK, *map(ROOT.joinpath, ("README.md", "CONTRIBUTING.md", "results/README.md"))])
VERBATIM = {"math", "bibliography", "code-block"}  # directives; the others hold prose
TITLED = {"dropdown", "admonition"}  # whose argument is prose
SPOKEN = {"term", "index", "doc", "ref", "download", "abbr"}  # roles whose text the page shows
NOT_OURS = re.compile(  # American, and of two British forms the one that the book does not use
    r"(behavi|c|fav|flav|h?on|lab|neighb|vap)or(s|ed|ing|ful|ite|hood)?|center(s|ed|ing)?|gray"
    r"|((un)?label|cancel|model|signal|travel)(ed|ing)|analyz(e[drs]?|ing)|catalogs?|defense"
    r"|fulfill|learnt|skeptical|spelt|toward"
)

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@cache
def dictionary():
    return SpellChecker(language="en").word_frequency


@cache
def own_words():
    return LIST.read_text(encoding="utf-8").splitlines()


def texts(page):
    """The prose of a page as Markdown: its cells, and of its figures captions and alt texts."""
    if page.suffix == ".md":
        return [page.read_text(encoding="utf-8")]
    cells = read(page).cells
    shown = [cell.metadata.get("mystnb", {}) for cell in cells]
    captions = [about["figure"]["caption"] for about in shown if "figure" in about]
    alts = [about["image"]["alt"] for about in shown if "alt" in about.get("image", {})]
    return [*(cell.source for cell in cells if cell.cell_type == "markdown"), *captions, *alts]


def without_blocks(text):
    """Markdown without blocks of code, and without the frames of directives."""
    kept, verbatim = [], ""
    for line in text.splitlines():
        fence = re.match(r"\s*([`~:]{3,})(?:\{([\w:-]+)\})?(.*)", line)
        if verbatim:
            verbatim = "" if line.strip() == verbatim else verbatim
        elif fence:
            marks, directive, rest = fence.groups()
            if directive in VERBATIM or (not directive and rest.strip()):
                verbatim = marks
            kept.append(rest if directive in TITLED else "")
        elif not re.match(r"\s*:[\w-]+:( |$)|\([\w-]+\)=$", line):
            kept.append(line)
    return "\n".join(kept)


def role_text(match):
    """What a page shows of a role: its text, or the term itself; of other roles nothing."""
    name, content = match.groups()
    text, pointed, _ = content.partition("<")
    return text if name in SPOKEN and (pointed or name in ("term", "index")) else " "


def plain(text):
    """Markdown -> its words, without what is not prose."""
    text = re.sub(r"\{([\w:]+)\}`([^`]*)`", role_text, without_blocks(text))
    text = re.sub(r"`+[^`]+`+", " ", text)  # code
    text = re.sub(r"\$\$.*?\$\$( \(eq-[\w-]+\))?|\$[^$]+\$", " ", text, flags=re.DOTALL)
    text = re.sub(r"\]\([^)]*\)|<[a-zA-Z/!][^>]*>|https?://\S+", " ", text)  # addresses
    return re.sub(r"\S*\w[./_]\w\S*", " ", text)  # names of files


@cache
def words(page):
    """The words of a page, without a genitive's 's. What has a digit or another letter than Latin
    ones is a name or a symbol.
    """
    found = re.findall(r"\w+(?:['’]\w+)?", " ".join(map(plain, texts(page))))
    found = {re.sub(r"['’]s?$", "", word) for word in found}
    return {word for word in found if re.fullmatch(r"[A-Za-zÀ-ÿ][A-Za-zÀ-ÿ'’]+", word)}


def is_known(word):
    listed = {word, word.lower()} & set(own_words())
    return bool(listed) or word.lower() in dictionary()


def is_british_with_z(word):
    """Whether the book spells so: neighbour, and normalize."""
    word = word.lower()
    with_z = re.sub(r"(?<=[a-z]{3})is(?=(?:e[drs]?|ers|ing|ations?)$)", "iz", word)
    return not NOT_OURS.fullmatch(word) and (with_z == word or not is_known(with_z))


@each_page
def test_each_word_is_known(page):
    unknown = sorted(word for word in words(page) if not is_known(word))
    assert not unknown, f"mend them in {page.name}, or add them to {LIST.name}"


@each_page
def test_spelling_is_british_with_z(page):
    assert sorted(word for word in words(page) if not is_british_with_z(word)) == []


@each_page
def test_no_line_begins_as_a_comment_does(page):
    lines = "\n".join(texts(page)).splitlines()
    assert [line for line in lines if line.lstrip().startswith("%")] == [], "MyST leaves them out"


def test_word_list_is_sorted_and_has_no_word_too_many():
    listed = own_words()
    assert listed == sorted(set(listed), key=str.casefold)
    used = set().union(*map(words, PAGES))
    used |= {word.lower() for word in used}
    assert [word for word in listed if word not in used] == []


def test_what_is_no_prose_is_left_out():
    page = """```{exercise}
:label: ex-here
Words in `code_of` a {doc}`chapter <xyzzy>`, {term}`weights <weight>`, {cite}`zhang2017`.
```
````{dropdown} Title?
It's $E = mc$ at https://example.org/zzz, [link](qqq.md).
````
```bash
grrr
```
"""
    found = re.findall(r"[\w']+", plain(page))
    assert " ".join(found) == "Words in a chapter weights Title It's at link"
