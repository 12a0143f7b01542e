"""Models from the hub: which files, how they get into its cache, and who asked for them.

``selection`` decides, purely. ``engine`` is the program that talks to the hub, with
``hub``, ``fetch`` and ``cache``; ``downloads`` and what it imports run in the supervisor,
which starts one engine for each question and each download.
"""
