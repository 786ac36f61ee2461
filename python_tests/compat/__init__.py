"""What the callables of :mod:`kdkernels.compat` must compute, project by project, and the page made from it."""
