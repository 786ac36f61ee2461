"""Losses with the names, arguments and conventions of other projects, for switching by changing one import.

Each module is named after a project and has the callables of that project under their own names:
``from kdkernels.compat.rep_distiller import DistillKL``. Value and gradient follow the project's formula, its divisor
and its defaults included, even where they differ from those of :mod:`kdkernels.functional`; an argument that cannot be
served raises. ``docs/parity.md`` lists what each of them computes and which call of :mod:`kdkernels.functional` it is.
"""
