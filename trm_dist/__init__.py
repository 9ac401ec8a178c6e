"""Distributed training of TRM that may be killed at any time and ends with the same bits.

Reading order: progress, randomness, config; data.order, data.sudoku; model.trm, model.losses;
checkpoint.names, seal, store, publish, snapshot, resume, manager; elastic.reduction, world,
preemption; feed, plan, train, worker.
"""

__version__ = "0.1.0"
