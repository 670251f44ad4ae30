"""Every field of every solver, as written on the command line."""

import dataclasses

import pytest

from fanal.config import build_solver
from fanal.errors import FanalError
from fanal.solvers import (
    AFS,
    DEIS,
    DPM2,
    DPMS,
    IPNDM,
    LMS,
    PNDM,
    RES,
    SDE,
    SOLVERS,
    SPNDM,
    Ancestral,
    Churn,
    DPMpp,
    DPMpp2S,
    DPMppSDE,
    UniPC,
)

WRITTEN = {
    "dpm2:r=0.7": DPM2(0.7),
    "dpm2:middle=sigma": DPM2(middle="sigma"),
    "dpmpp2s:r=0.3": DPMpp2S(0.3),
    "dpms:order=2,variant=taylor,nodes=grid,lower_final=always,predict=data": DPMS(
        2, "taylor", "grid", "always", "data"
    ),
    "dpms:order=3,calls=10": DPMS(3, calls=10),
    "dpmpp:order=3": DPMpp(3),
    "dpmpp:order=3,variant=taylor,lower_final=15,predict=noise": DPMpp(3, "taylor", 15, "noise"),
    "dpmpp:lower_final=never": DPMpp(lower_final="never"),
    "unipc:order=3,variant=bh1,lower_final=10": UniPC(3, "bh1", 10),
    "res:order=3,form=singlestep": RES(3, "singlestep"),
    "spndm:finish=false": SPNDM(False),
    "pndm:order=3,warmup=heun,finish=false": PNDM(3, "heun", False),
    "ipndm:order=2": IPNDM(2),
    "lms:order=3,finish=false": LMS(3, False),
    "deis:order=3,basis=logrho,lower_final=15": DEIS(3, "logrho", 15),
    "deis:sigma_min=0.01,sigma_max=50,points=10000": DEIS(sigma_min=0.01, sigma_max=50.0, points=10_000),
    "sde:order=3,eta=0.5,variant=exact,window=0.5..20,s_noise=1.003": SDE(
        3, 0.5, "exact", s_noise=1.003, window=(0.5, 20.0)
    ),
    "sde:order=3,longest=inf": SDE(3, longest=float("inf")),
    "dpmpp_sde:eta=0.5,r=0.4": DPMppSDE(0.5, 0.4),
    "afs:solver=ipndm:order=3": AFS(IPNDM(3)),
    "ancestral:solver=unipc,eta=0.5": Ancestral(UniPC(), 0.5),
    "churn:solver=dpmpp,s_churn=5": Churn(DPMpp(), 5.0),
}


@pytest.mark.parametrize("text", WRITTEN)
def test_fields_reach_the_solver_with_their_kind(text):
    built = build_solver(text)
    assert built == WRITTEN[text]
    for field in dataclasses.fields(built):
        assert type(getattr(built, field.name)) is type(getattr(WRITTEN[text], field.name)), field.name


def test_every_solver_with_fields_is_written_here():
    with_fields = {name for name, kind in SOLVERS.items() if dataclasses.fields(kind)}
    assert with_fields == {text.partition(":")[0] for text in WRITTEN}


def test_a_step_is_hashable_and_comparable_by_its_fields():
    for kind in SOLVERS.values():
        assert kind() == kind()
        assert hash(kind()) == hash(kind())


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("dpmpp:order=two", "must be like 2, got 'two'"),
        ("dpmpp:order=2.5", "must be like 2, got '2.5'"),
        ("dpmpp:order=9", "dpmpp has orders 1 to 3, got 9"),
        ("dpmpp:lower_final=sometimes", 'lower_final is "always", "never" or a number'),
        ("dpmpp:lower_final=0", "lower_final"),
        ("dpmpp:variant=heun", "unknown variant of dpmpp 'heun'"),
        ("unipc:variant=3", "unknown variant of unipc '3'"),
        ("sde:window=3", "must be like"),
        ("lms:finish=maybe", "must be like True"),
        ("pndm:times=999", "times of pndm"),
        ("deis:basis=tba", "did you mean 'tab'"),
    ],
)
def test_a_field_that_makes_no_sense_is_refused(text, told):
    with pytest.raises(FanalError) as caught:
        build_solver(text)
    assert told in str(caught.value)
