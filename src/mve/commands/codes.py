"""Exit codes of every command."""

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
EXIT_CODES = {
    0: "done",
    FAILED: "a check failed, or a defect of mve",
    BAD_INPUT: "bad input: the command line, a setting, a file, no room",
    3: "training diverged; the last checkpoint is from before",
    4: "the environment failed; everything before it is saved, or for one in JAX up to the last checkpoint",
    129: "SIGHUP: stopped and saved",
    INTERRUPTED: "Ctrl-C: stopped and saved; at the second one, left at once",
    143: "SIGTERM: stopped and saved",
}
