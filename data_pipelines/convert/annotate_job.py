"""Beam job: reasoning annotations of an indexed split (see `data_pipelines.annotate`).

    python -m data_pipelines.convert.annotate_job --input data/bridge_dataset/1.0.0 \\
        --output bridge.jsonl --writer openai:http://vlm:8000/v1,qwen3-vl

The result is the file that `lara data annotate` writes, byte for byte. Workers on other machines
need --index: a copy of the input's index in a bucket or on a shared disk.
"""

from collections.abc import Sequence
from functools import partial

from data_pipelines import storage
from data_pipelines.annotate import annotate
from data_pipelines.annotate.episode import totals
from data_pipelines.annotate.schema import AnnotationWriter
from data_pipelines.convert import pipeline
from data_pipelines.convert.annotation_parts import Annotator, parts_of, read_part, write_part
from data_pipelines.convert.output import delete_folder, updated_file
from data_pipelines.convert.shared_index import add_options, index_of


def main(argv: Sequence[str]) -> int:
    """Annotates a split; the last line on standard output is the annotation file."""
    parser = pipeline.parser("annotate_job", "Makes the annotations of `lara data annotate`.")
    add_options(parser)
    annotate.add_options(parser)
    arguments, options = pipeline.parse(parser, argv)
    annotator = Annotator(
        writer=arguments.writer,
        detector=arguments.detector,
        settings=annotate.settings_of(arguments),
    )
    index, index_folder = index_of(arguments)
    output = storage.absolute(arguments.output)
    with (
        updated_file(output) as local,
        AnnotationWriter(
            local, partial(annotator.made, index), overwrite=arguments.overwrite
        ) as file,
    ):
        numbers = index.episodes["number"].tolist()
        todo = [number for number in numbers if number not in file.kept]
        parts = parts_of(todo, f"{output}.parts")
        pipeline.run(
            parts,
            partial(write_part, index_folder, index.source, annotator),
            f"{output}.results",
            options,
        )
        provenances = dict(file.kept)
        for part in parts:
            for line in read_part(part.file):
                file.append(line)
                provenances[line["number"]] = line["provenance"]
        file.finish()
    delete_folder(f"{output}.parts")
    for text in annotate.summary(totals(provenances.values())):
        pipeline.say(text)
    print(output)
    return 0


if __name__ == "__main__":
    pipeline.call(main)
