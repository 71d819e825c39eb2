from tests.support.vectors import compared


def pytest_terminal_summary(terminalreporter):
    if compared:
        parts = ", ".join(f"{name} {count:,}" for name, count in sorted(compared.items()))
        terminalreporter.write_line(f"parity: {compared.total():,} values equal the original's ({parts})")
