"""The ports of posteriordb's models against its reference draws: Stein's identities and the evidence.

python benchmarks/posteriordb_ports.py [--folder FOLDER] [--names garch-garch11 ...] [--num-draws 10000]
"""

import argparse

import pandas as pd

from pyro_nf.models.benchmarks import posteriordb


def check(name, folder, num_draws):
    """Return a posterior's line: the worst z-score of each identity, and two estimates of the evidence."""
    posterior = posteriordb.load(name, folder)
    scores = {f"|z| {kind}": float(z.abs().max()) for kind, z in posteriordb.stein_scores(posterior).items()}
    found = posteriordb.importance_evidence(posterior, num_draws)
    return {
        "posterior": name,
        **scores,
        "log evidence": found.log_evidence,
        "se": found.se,
        "ESS": found.ess_fraction,
        "known": posterior.log_evidence,
        "known se": posterior.log_evidence_se,
    }


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="posteriordb's files; else PYRO_NF_POSTERIORDB")
    parser.add_argument("--names", nargs="+", default=posteriordb.names())
    parser.add_argument("--num-draws", type=int, default=10_000)
    args = parser.parse_args()
    table = pd.DataFrame([check(name, args.folder, args.num_draws) for name in args.names])
    print(table.to_string(index=False, float_format="%.4f"))


if __name__ == "__main__":
    main()
