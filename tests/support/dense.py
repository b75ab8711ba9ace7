"""Dense linear algebra in NumPy, which shares no code with the library."""

import numpy as np


def multipliers(plan, f_bar, g_bar):
    """x, y with `[diag(row sums), P; P^T, diag(column sums)] (x, y) = (f_bar, g_bar)`, the first x being 0."""
    system = np.block([[np.diag(plan.sum(1)), plan], [plan.T, np.diag(plan.sum(0))]])
    solution = np.linalg.solve(system[1:, 1:], np.concatenate([f_bar, g_bar])[1:])
    return np.split(np.concatenate([[0], solution]), [len(f_bar)])
