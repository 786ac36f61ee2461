"""``python -m python_tests.compat.page --write`` makes ``docs/parity.md`` from the conventions that are tested."""

import sys
from pathlib import Path

from .conventions import Convention, Project, projects

PAGE = Path(__file__).resolve().parents[2] / "docs/parity.md"
HEAD = """# Losses of other projects

The same name means different losses in different projects: who multiplies by T², what the sum is divided by, and in
which direction a divergence goes. `kdkernels.compat` has callables with the names, arguments and conventions of these
projects, so that switching takes one import. Value and gradient of each are compared with the project's formula in
float64; this page is made from the same table. An argument that cannot be served raises. Results of 16-bit inputs are
in fp32.
"""
ROWS = {
    "takes": lambda of: of.takes,
    "computes": lambda of: of.computes,
    "temperature": lambda of: of.temperature,
    "divided by": lambda of: of.divisor,
    "with `kdkernels.functional`": lambda of: f"`{of.ours}`",
    "beware": lambda of: of.traps,
}


def table(conventions: tuple[Convention, ...]) -> str:
    """One column for each callable; a row that is empty in all of them is left out."""
    rows = [["", *(f"`{of.call}`" for of in conventions)], ["---"] * (len(conventions) + 1)]
    cells = {name: [cell(of) for of in conventions] for name, cell in ROWS.items()}
    rows += [[name, *of_row] for name, of_row in cells.items() if any(of_row)]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows)


def section(project: Project) -> str:
    code = f"```python\n# before\n{project.before}\n\n# after\n{project.after}\n```"
    return f"## {project.name}\n\n`{project.repository}`\n\n{code}\n\n{table(project.conventions)}\n"


def page() -> str:
    return "\n".join([HEAD, *map(section, projects())])


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python -m python_tests.compat.page --write")
    PAGE.write_text(page())
