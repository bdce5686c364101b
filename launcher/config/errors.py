"""The one exception a user's mistake becomes."""


class ConfigError(Exception):
    """A setting that cannot work: the field, its value, why, and the nearest that works.

    Printed as one message without a traceback; the process exits with code 2.
    """

    def __init__(self, field: str, value: object, why: str, remedy: str) -> None:
        self.field, self.value, self.why, self.remedy = field, value, why, remedy
        shown = field if value is None else f"{field}={value}"
        super().__init__(f"{shown}: {why}\n  nearest that works: {remedy}")
