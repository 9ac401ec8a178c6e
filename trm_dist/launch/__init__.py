"""What keeps a run going on a node: `trm_dist launch` and the processes it is made of.

supervisor        first and last: signals, notices, health, restarts, the exit code; no torch
  `-- zygote      has imported torch and the trainer; forks, and does nothing else
        |-- agent      torch's elastic agent in one rendezvous
        |     `-- stub     stands before the agent for each worker
        `-- worker    trains
"""
