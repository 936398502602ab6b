"""The `fastgrpo` command: train, doctor, bench, report."""


def main() -> None:
    raise SystemExit("fastgrpo: no command yet")
