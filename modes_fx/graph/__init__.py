"""What a traced model carries, from the model's call down to the experts, so that any graph of it holds the whole meaning.

``takeover`` puts watches in front of modules' calls; they say which tokens run (``running``), of which model (``runtime``), and
which thresholds hold (``in_force``). In front of each expert dispatch (``experts``) stands a marker operation (``marker``) that
gives dropped pairs the weight 0. That is right wherever the model runs; where Inductor compiles, ``hook`` turns each marked
dispatch into one that computes the kept pairs alone.
"""
