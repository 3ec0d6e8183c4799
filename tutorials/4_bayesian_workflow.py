# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Bayesian workflow
#
# A whole analysis, from prior to report, with a flow in the place where a sampler usually stands: prior
# predictive check, fit, diagnosis, model comparison by leave-one-out cross-validation, posterior predictive
# check.
#
# The data are the *sleep study* of Belenky and others (2003), as `lme4` ships them: 18 people slept three hours
# a night, and were tested on ten days. An entry is a person's mean reaction time on a day, in milliseconds.

# %%
import io

import arviz as az
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Predictive
from pyro.infer.autoguide import AutoNormal

from pyro_nf.diagnostics import compare, diagnose, loo, to_arviz
from pyro_nf.guides import AutoFlow
from pyro_nf.inference import FlowSVI

pyro.set_rng_seed(0)
table = """
subject    0     1     2     3     4     5     6     7     8     9
308    249.6 258.7 250.8 321.4 356.9 414.7 382.2 290.1 430.6 466.4
309    222.7 205.3 203.0 204.7 207.7 216.0 213.6 217.7 224.3 237.3
310    199.1 194.3 234.3 232.8 229.3 220.5 235.4 255.8 261.0 247.5
330    321.5 300.4 283.9 285.1 285.8 297.6 280.2 318.3 305.3 354.0
331    287.6 285.0 301.8 320.1 316.3 293.3 290.1 334.8 293.7 371.6
332    234.9 242.8 273.0 309.8 317.5 310.0 454.2 346.8 330.3 253.9
333    283.8 289.6 276.8 299.8 297.2 338.2 332.0 348.8 333.4 362.0
334    265.5 276.2 243.4 254.7 279.0 284.2 305.5 331.5 335.7 377.3
335    241.6 273.9 254.5 270.8 251.5 254.6 245.5 235.3 235.8 237.2
337    312.4 313.8 291.6 346.1 365.7 391.8 404.3 416.7 455.9 458.9
349    236.1 230.3 238.9 254.9 250.7 269.8 281.6 308.1 336.3 351.6
350    256.3 243.5 256.2 255.5 268.9 329.7 379.4 362.9 394.5 389.1
351    250.5 300.1 269.9 280.6 271.8 304.6 287.7 266.6 321.5 347.6
352    221.7 298.2 326.9 346.9 348.7 352.8 354.4 360.4 375.6 388.5
369    271.9 268.4 257.2 277.7 314.8 317.2 298.1 348.1 340.3 366.5
370    225.3 234.5 238.9 240.5 267.5 344.2 281.1 347.6 365.2 372.2
371    269.9 272.4 277.9 281.8 279.2 284.5 259.3 304.6 350.8 369.5
372    269.4 273.5 297.6 310.6 287.2 329.6 334.5 343.2 369.1 364.1
"""
sleep = pd.read_csv(io.StringIO(table), sep=r"\s+", index_col="subject")
reaction = torch.tensor(sleep.values, dtype=torch.get_default_dtype()).flatten()
person = torch.arange(18).repeat_interleave(10)
day = torch.arange(10.0).repeat(18)

# %% [markdown]
# ## The model and its prior
#
# Each person has a level and a slope of their own; both vary between people. The priors are what one would
# guess before seeing data: simple reactions take around 300 ms, and a bad night may cost tens of milliseconds.


# %%
def varying_slopes(person, day, reaction=None):
    level = pyro.sample("level", dist.Normal(300.0, 50.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 20.0))
    sd_level = pyro.sample("sd_level", dist.HalfNormal(50.0))
    sd_slope = pyro.sample("sd_slope", dist.HalfNormal(20.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(50.0))
    with pyro.plate("person", 18):
        a = pyro.sample("a", dist.Normal(level, sd_level))
        b = pyro.sample("b", dist.Normal(slope, sd_slope))
    with pyro.plate("test", len(person)):
        return pyro.sample("reaction", dist.Normal(a[person] + b[person] * day, sigma), obs=reaction)


prior = Predictive(varying_slopes, num_samples=50)(person, day)["reaction"].reshape(-1, 18, 10)
figure, axis = plt.subplots(figsize=(5, 3), layout="constrained")
axis.plot(prior[:, 0].T, color="C0", alpha=0.3, linewidth=0.8)
_ = axis.set(xlabel="days", ylabel="reaction (ms)", title="One person, 50 draws of the prior")
# %% [markdown]
# ## Fit and diagnose

# %%
data = (person, day, reaction)
mean_field, flow = AutoNormal(varying_slopes), AutoFlow(varying_slopes)
results = {
    "mean-field": FlowSVI(varying_slopes, mean_field, seed=0, progress=False).run(*data),
    "flow": FlowSVI(varying_slopes, flow, seed=0, progress=False).run(*data),
}
for name, result in results.items():
    print(f"{name}: {result}")
compare(results).drop(columns=["reasons", "seconds"]).round(3)

# %%
print(diagnose(varying_slopes, mean_field, *data))
print()
print(diagnose(varying_slopes, flow, *data))

# %%
idata = to_arviz(varying_slopes, flow, *data, result=results["flow"])
names = ["level", "slope", "sd_level", "sd_slope", "sigma"]
idata_mean_field = to_arviz(varying_slopes, mean_field, *data)
pd.concat(
    {
        name: az.summary(each, kind="stats", var_names=names)[["mean", "sd"]]
        for name, each in {"mean-field": idata_mean_field, "flow": idata}.items()
    },
    axis=1,
)

# %% [markdown]
# ## Two other models
#
# Do people really differ in how they take it? And is the noise normal? Two other models answer: one with a
# common slope, and one with Student-t noise.


# %%
def common_slope(person, day, reaction=None):
    level = pyro.sample("level", dist.Normal(300.0, 50.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 20.0))
    sd_level = pyro.sample("sd_level", dist.HalfNormal(50.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(50.0))
    with pyro.plate("person", 18):
        a = pyro.sample("a", dist.Normal(level, sd_level))
    with pyro.plate("test", len(person)):
        return pyro.sample("reaction", dist.Normal(a[person] + slope * day, sigma), obs=reaction)


def student_noise(person, day, reaction=None):
    level = pyro.sample("level", dist.Normal(300.0, 50.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 20.0))
    sd_level = pyro.sample("sd_level", dist.HalfNormal(50.0))
    sd_slope = pyro.sample("sd_slope", dist.HalfNormal(20.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(50.0))
    df = pyro.sample("df", dist.Gamma(2.0, 0.1))
    with pyro.plate("person", 18):
        a = pyro.sample("a", dist.Normal(level, sd_level))
        b = pyro.sample("b", dist.Normal(slope, sd_slope))
    with pyro.plate("test", len(person)):
        return pyro.sample("reaction", dist.StudentT(df, a[person] + b[person] * day, sigma), obs=reaction)


fitted = {"varying slopes": (idata, results["flow"])}
for name, model in {"common slope": common_slope, "varying slopes, Student-t": student_noise}.items():
    guide = AutoFlow(model)
    result = FlowSVI(model, guide, seed=0, progress=False).run(*data)
    print(f"{name}: {diagnose(model, guide, *data)}")
    fitted[name] = to_arviz(model, guide, *data), result

# %% [markdown]
# `loo` estimates how well each model predicts an observation that it has not seen. It takes the guide's weights
# into account, where ArviZ's own takes the draws to be exact, and returns ArviZ's own object.

# %%
loos = {name: loo(each) for name, (each, _) in fitted.items()}
az.compare(loos).round(2)

# %%
best = fitted["varying slopes, Student-t"][0]
normal_i, student_i = (loos[name].loo_i.values for name in ("varying slopes", "varying slopes, Student-t"))
order = np.argsort(normal_i - student_i)
pd.DataFrame(
    {
        "person": [sleep.index[int(person[i])] for i in order[:4]],
        "day": [int(day[i]) for i in order[:4]],
        "reaction (ms)": [float(reaction[i]) for i in order[:4]],
        "normal": normal_i[order[:4]].round(1),
        "Student-t": student_i[order[:4]].round(1),
    }
)

# %% [markdown]
# ## Posterior predictive check

# %%
predicted = best["posterior_predictive"]["reaction"].values.reshape(-1, 18, 10)
mean = best["posterior"]["a"].values[0][:, :, None] + best["posterior"]["b"].values[0][:, :, None] * np.arange(10)
figure, axes = plt.subplots(3, 6, figsize=(11, 5.5), sharex=True, sharey=True, layout="constrained")
for index, axis in enumerate(axes.flat):
    low, high = np.quantile(predicted[:, index], [0.05, 0.95], axis=0)
    axis.fill_between(range(10), low, high, color="0.88")
    axis.plot(range(10), mean[:40, index].T, color="C0", alpha=0.15, linewidth=0.8)
    axis.plot(range(10), sleep.values[index], ".", color="k")
    axis.set_title(sleep.index[index], fontsize="small")
axes[1, 0].set_ylabel("reaction (ms)")
axes[2, 2].set_xlabel("days")
_ = axes[0, 0].set_ylim(150, 520)
