PERIODS: tuple[tuple[float, float], ...] = ((1.0, 1.0),)
