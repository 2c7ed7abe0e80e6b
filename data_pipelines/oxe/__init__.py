"""Open X-Embodiment: what each dataset is, as data, and how its steps become ours."""
