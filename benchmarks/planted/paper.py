"""What the PAV paper shows for this task (Figs. 3a-c), read from the drawings to three decimals."""

ITERATIONS = 10_000
FIG_3A_ITERATIONS = tuple(range(0, 3600, 200))
FIG_3A_EFFECTIVE = (
    0.0034, 0.0002, 0.834, 0.9969, 0.9921, 0.9922, 0.9921, 0.9921, 0.9922, 0.992, 0.9924, 0.9923,
    0.9922, 0.9922, 0.9921, 0.992, 0.9922, 0.9921,
)  # fmt: skip
FIG_3A_ONLY_Q = (
    0.0054, 0.0001, 0, 0.0002, 0.0001, 0, 0, 0.0002, 0.0001, 0.0003, 0.0002, 0, 0, 0, 0.0001, 0,
    0.0003, 0,
)  # fmt: skip
FIG_3B_GAMMAS = tuple(float(g) for g in range(1, 21))
FIG_3B_EFFECTIVE = (
    0.006, 0.005, 0.035, 0.063, 0.158, 0.334, 0.571, 0.769, 0.874, 0.928, 0.937, 0.93, 0.822,
    0.531, 0.301, 0.174, 0.065, 0.043, 0.03, 0.005,
)  # fmt: skip
FIG_3B_ONLY_Q = 0.005
FIG_3C_N = (2, 4, 8, 16, 32, 64, 128, 256)
FIG_3C = {
    "effective": (0.005, 0.049, 0.086, 0.123, 0.17, 0.212, 0.231, 0.243),
    "only Q": (0.005, 0.008, 0.017, 0.038, 0.052, 0.063, 0.067, 0.07),
    "initial": (0.005, 0.016, 0.028, 0.052, 0.075, 0.082, 0.097, 0.102),
}
# Extremes of the heat maps' colours, by the prover's gamma.
FIG_10_RANGE = {10: (-0.3, 0.3), 100: (-0.85, 0.0)}
