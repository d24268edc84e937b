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
_ENTRY = re.compile(r"^( +)(\*{0,2}\w+(?:, \*{0,2}\w+)*):(.*)$")


class ProjectDocstrings(griffe.Extension):
    """Rewrites docstrings to what griffe's Google style knows."""

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring:
            arguments = list(getattr(obj, "parameters", ()))
            known = {argument.name for argument in arguments}
            takes_more = any(a.kind is griffe.ParameterKind.var_keyword for a in arguments)
            text = _EXAMPLE.sub("Examples:", obj.docstring.value)
            text = _BARE_DOCTEST.sub(lambda found: "Examples:\n" + _indented(found[0]), text)
            obj.docstring.value = _separate_arguments(text, known if takes_more else None)


def _indented(text: str) -> str:
    return "\n".join("    " + line if line else line for line in text.split("\n"))


def _separate_arguments(text: str, known: set[str] | None) -> str:
    """Repeats the text of `a, b: text` for `a` and for `b`, within the section `Args:`.

    Args:
      known: names in the signature of what takes `**options` as well: other names that are
        documented are options, and get a section of their own. None: the signature has no such
        parameter, and griffe warns of every other name.
    """
    lines, result, options, indent, at = text.split("\n"), [], [], None, 0
    while at < len(lines):
        line = lines[at]
        depth = len(line) - len(line.lstrip())
        if line.strip() == "Args:":
            indent = depth
        elif line.strip() and indent is not None and depth <= indent:
            result += ["Other Parameters:", *options, ""] if options else []
            options, indent = [], None
        entry = _ENTRY.match(line) if indent is not None else None
        at += 1
        if not entry:
            result.append(line)
            continue
        more = []
        while at < len(lines) and lines[at].startswith(entry[1] + " "):
            more.append(lines[at])
            at += 1
        for name in entry[2].split(", "):
            is_option = known is not None and name.lstrip("*") not in known
            described = [f"{entry[1]}{name}:{entry[3]}", *more]
            (options if is_option else result).extend(described)
    return "\n".join([*result, *(["", "Other Parameters:", *options] if options else [])])
