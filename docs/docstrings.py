"""Docstrings as the API page wants them: they are written for `help()`, and put into Markdown here."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

SECTIONS = ("Args:", "Attributes:", "Returns:", "Raises:")


def to_markdown(docstring: str, parameters: list[str]) -> str:
    """Fences what is indented, parts lists from paragraphs, and gives every parameter a line of its own."""
    lines = docstring.splitlines()
    start = next((i for i, line in enumerate(lines) if line in SECTIONS), len(lines))
    paragraphs = "\n".join(lines[:start]).split("\n\n")
    described = "\n".join(_apart(line, parameters) for line in lines[start:])
    return "\n\n".join([*map(_paragraph, paragraphs), described]).strip()


def _paragraph(text: str) -> str:
    """A picture or an equation with its title stays as it is drawn; a list is parted from what stands around it."""
    if re.search(r"^ {4}", text, re.MULTILINE):
        # a paragraph that ends in a drawing, such as the masks' titles over their pictures
        return f"```text\n{textwrap.dedent(text)}\n```"
    parted: list[str] = []
    was_item = False
    for line in text.splitlines():
        item = line.startswith("  ")
        if item != was_item and parted:
            parted.append("")
        was_item = item
        parted.append(line)
    return "\n".join(parted)


def _apart(line: str, parameters: list[str]) -> str:
    """`  q: rows. k: columns.` describes two parameters."""
    indent = re.match(" *", line).group()
    if len(indent) != 2 or not parameters:
        return line
    names = "|".join(map(re.escape, parameters))
    return indent + re.sub(rf"(\.? {{2,}}|\. |(?<=`), )(?=\*{{0,2}}(?:{names}): )", f".\n{indent}", line.strip())


class Docstrings(griffe.Extension):
    """What is said in comments and bases is said in docstrings and signatures."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Goes through the package once it is read."""
        self._visit(pkg)

    def _visit(self, obj: Any) -> None:
        for member in list(obj.members.values()):
            if not member.is_alias:
                self._visit(member)
        if obj.is_class:
            self._fields(obj)
        if obj.docstring:
            parameters = [p.name for p in obj.parameters] if obj.is_function or obj.is_class else []
            obj.docstring.value = to_markdown(obj.docstring.value, [name for name in parameters if name != "self"])

    def _fields(self, cls: griffe.Class) -> None:
        """The fields of a named tuple, or of a value, are its parameters; the comment beside a field describes it."""
        own = [a for a in cls.members.values() if a.is_attribute and "instance-attribute" in a.labels]
        described = []
        for field in own:
            line = field.lines_collection[field.filepath][field.lineno - 1]
            if "  # " in line:
                described.append(f"  {field.name}: " + re.sub(r"\[[^\]]*\]", r"`\g<0>`", line.split("  # ")[1]))
        if described and cls.docstring:
            cls.docstring.value += "\n\nAttributes:\n" + "\n".join(described)
        bases = {str(base).split(".")[-1] for base in cls.bases}
        if "__init__" in cls.members or not bases & {"NamedTuple", "Value", "Mask", "Modifier"}:
            return
        kind = griffe.ParameterKind.positional_or_keyword
        parameters = [griffe.Parameter("self", kind=kind)]
        parameters += [griffe.Parameter(f.name, annotation=f.annotation, kind=kind, default=f.value) for f in own]
        init = griffe.Function("__init__", parameters=griffe.Parameters(*parameters), parent=cls)
        cls.set_member("__init__", init)
