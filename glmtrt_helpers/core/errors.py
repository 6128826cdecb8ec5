"""The one error of the workbook: a sentence that says what is wrong, where, and what to do."""


class WorkbookError(Exception):
    """Raised for bad input. The command line prints its text as one line and exits with 1."""
