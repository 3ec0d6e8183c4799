"""Jobs, each done once: their records are lines of JSON in a file, from which a run goes on where the last one stopped.

A job is a dictionary of what identifies it, with the same keys for all jobs of a file; its record has these entries and
those that the work returned.
"""

import json
import multiprocessing
import warnings
from functools import partial

import torch


def do(work, jobs, file, processes=1, said=None):
    """Do the jobs that the file has no record of, each with one thread; return the records of all that were done.

    Whatever a job raises is printed, and the others go on; it is tried again in the next run.

    Args:
        work: `job -> dict`, a function that other processes can import, or a `partial` of one.
        jobs: Dictionaries, in the order in which records are wanted.
        file: Path of the records.
        processes: Jobs at a time.
        said: `record -> str`, to print when a job is done.
    """
    lines = file.read_text().splitlines() if file.exists() else []
    names = list(jobs[0])
    records = {tuple(map(record.get, names)): record for record in map(json.loads, lines) if "error" not in record}
    missing = [job for job in jobs if tuple(job.values()) not in records]
    with multiprocessing.get_context("spawn").Pool(processes) as pool, file.open("a") as results:
        for job, record, error in pool.imap_unordered(partial(_attempt, work), missing):
            if error:
                print(f"failed: {', '.join(map(str, job.values()))}: {error}", flush=True)
                continue
            records[tuple(job.values())] = record
            results.write(json.dumps(record) + "\n")
            results.flush()
            if said:
                print(f"{', '.join(map(str, job.values()))}: {said(record)}", flush=True)
    keys = [tuple(job.values()) for job in jobs]
    return [records[key] for key in keys if key in records]


def _attempt(work, job):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        return job, {**job, **work(job)}, None
    except Exception as error:  # of any kind: fits, models and peers raise their own
        return job, None, f"{type(error).__name__}: {error}"
