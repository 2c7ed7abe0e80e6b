"""`lara aot`: a recipe compiled for TPUs that are not there, and what the program would cost.

topology --compile.py--> program --hlo.py--> FLOPs, bytes, collectives --roofline.py--> seconds
                                             chips.py: published numbers ------^
"""
