"""The workbook's helpers: a folder a step, in the order of the walk; each imports only what stands before it.

core < checkpoints (00) < inputs (01) < sessions < patches (02) < export (03) < graphs (04) < engines (05) < chat (06)
< fast (07) < bench < standin < workbook < cli
"""

__version__ = "0.1.0"
