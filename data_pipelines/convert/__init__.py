"""Conversions at scale: Beam jobs, and what each of them does to one element, without Beam.

    python -m data_pipelines.convert.JOB --input ... --output ... [Beam's pipeline options]

| job | what it makes | an element |
|---|---|---|
| rlds_to_array_record | one ArrayRecord record a step, and their index | a file of the dataset |
| lerobot_to_rlds | a TFDS version directory | a run of episodes |
| annotate_job | reasoning annotations | a run of episodes |
| stats_job | statistics for normalisation | a file of the dataset |

An element depends on nothing but the input, and its output's name is known beforehand: a worker
that dies is started again, and the result does not depend on how many there were. Only the jobs
and what they share (`pipeline`) import `apache_beam`, which lives in an environment of its own
(launch/beam.sh).
"""
