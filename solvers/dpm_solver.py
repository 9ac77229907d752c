from fastsample.grid import exponential_step
def dpmpp_2m(model, x, grid):
    old = None
    for s, t in grid.steps():
        x0 = model.predict(x, s)
        slope = 0.0 * x0
        if old and t.sigma > 0:
            slope = (x0 - old[0]) * ((t.lam - s.lam) / (s.lam - old[1].lam))
        x = exponential_step(x, x0 + 0.5 * slope, s, t)
        old = x0, s
    return x
