"""Helpers of the workbook: one module for each notebook, in the order the data flows.

checkpoints (00) -> inputs (01) -> patches (02) -> export (03) -> graphs, verification (04)
"""

__version__ = "0.1.0"
