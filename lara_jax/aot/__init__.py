"""`lara aot`: a recipe compiled for TPUs that are not there, and what the program would cost.

topology --compile.py--> program --hlo.py--> FLOPs, bytes, collectives --roofline.py--> seconds
                                             chips.py: published numbers ------^

Several of them are compiled one by one in processes of their own (jobs.py): over topologies
(plot.py), or in search of the largest batch and the fastest layout (search.py).
"""
