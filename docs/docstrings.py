"""Extension of griffe: reads this project's docstrings for the API reference.

Doctests become a section of examples, with or without `Example:` above them, and a line such as
`a, b: text` documents each of the arguments that it names.
"""

import re

import griffe

_EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)
_BARE_DOCTEST = re.compile(
    r"(?:\A|(?<=\n\n))(?:>>> .*(?:\n(?!\n).*)*)(?:\n\n>>> .*(?:\n(?!\n).*)*)*"
)
_GROUP = re.compile(r"^(\s+)(\*{0,2}\w+(?:, \*{0,2}\w+)+):(.*)$")


class ProjectDocstrings(griffe.Extension):
    """Rewrites docstrings to what griffe's Google style knows."""

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring:
            known = {argument.name for argument in getattr(obj, "parameters", ())}
            text = _EXAMPLE.sub("Examples:", obj.docstring.value)
            text = _BARE_DOCTEST.sub(lambda found: "Examples:\n" + _indented(found[0]), text)
            obj.docstring.value = _separate_arguments(text, known)


def _indented(text: str) -> str:
    return "\n".join("    " + line if line else line for line in text.split("\n"))


def _separate_arguments(text: str, known: set[str]) -> str:
    """Repeats the text of `a, b: text` for `a` and for `b`, within the section `Args:`.

    Where a line names `**options`, those of its names that the signature lacks go with them.
    """
    lines, result, indent, at = text.split("\n"), [], None, 0
    while at < len(lines):
        line = lines[at]
        depth = len(line) - len(line.lstrip())
        if line.strip() == "Args:":
            indent = depth
        elif line.strip() and indent is not None and depth <= indent:
            indent = None
        group = _GROUP.match(line) if indent is not None else None
        at += 1
        if not group:
            result.append(line)
            continue
        more = []
        while at < len(lines) and lines[at].startswith(group[1] + " "):
            more.append(lines[at])
            at += 1
        names = group[2].split(", ")
        if names[-1].startswith("**"):
            names = [name for name in names if name in known or name.startswith("**")]
        for name in names:
            result += [f"{group[1]}{name}:{group[3]}", *more]
    return "\n".join(result)
