"""The search: the journal, the searcher and the scheduler that are rebuilt from it.

`journal` needs the standard library alone; `searcher` and `scheduler` import Ray and Optuna, so
nothing is imported here.
"""
