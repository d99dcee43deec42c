"""The same run on many machines: answers by actors (``engine``), verdicts by graders (``graders``), ranks
(``trainers``), all on Ray. Stages see an engine and a pool as ever; only this room says ``ray``, and only in
``actors``, ``connect``, ``placement``, ``graders`` and ``trainers``.
"""
