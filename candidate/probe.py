"""probe.py NAME words=held|train ens=N beta=B [values=a,b] : satisfied by value on held-out prompts 40.."""
import os, sys, json, random, time
os.environ.update(VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1", HF_HUB_OFFLINE="1")
sys.path.insert(0, "/work/main")
from pathlib import Path
from collections import defaultdict
from statistics import mean, median
def main():
    from pad_vllm.demo import wishes, questions
    from pad_vllm.demo.measures import DIRECTIONS, OPPOSITES, measures_of, loops, DIMENSIONS
    from pad_vllm.demo.smollm import build, DEFAULTS
    from pad_vllm.demo.recipe import ENGINE
    from pad_vllm.evaluation.harness import Engine
    from pad_vllm.evaluation.engine import Request
    from pad_vllm.training.data import prompt_ids
    from transformers import AutoTokenizer
    models = build()
    tok = AutoTokenizer.from_pretrained(models.base)
    work = Path("/tmp/probe"); 
    arg = dict(a.split("=") for a in sys.argv[2:])
    name = sys.argv[1]; N = int(arg.get("n", 8)); beta=float(arg.get("beta", 2)); ens=int(arg.get("ens",1)); words=arg.get("words","held")
    values = arg["values"].split(",") if "values" in arg else list(DIRECTIONS)
    reward = arg.get("reward") or str(models.reward)
    MT = 160
    prompts = wishes.prompts(held_out=True)[40:40+N] + questions.questions(40+N, held_out=True)[40:40+N]
    sampling = dict(temperature=0.7, max_tokens=MT, seed=7, nll=True, **ENGINE)
    cells = [(p, v) for p in prompts for v in values]
    rng = random.Random(5)
    extra = json.loads(Path("/tmp/probe/extra.json").read_text()) if words=="extra" else None
    def wish(v):
        if words == "extra": pool = extra[v]
        elif words == "train": pool = wishes._read("preferences")[v]["train"]
        else: pool = wishes.wordings(v, held_out=True)
        return rng.sample(pool, ens)
    reqs = []
    betas = json.loads(arg["betas"]) if "betas" in arg else {}
    for p, v in cells:
        w = wish(v)
        opp = float(arg.get("opp", 0)); w2 = (rng.sample(wishes._read("preferences")[OPPOSITES[v]]["train"], ens) if opp else []); allw = w + w2
        g = {"pad_preference": allw[0] if len(allw) == 1 else allw, "pad_beta": betas.get(v, beta)}
        if len(allw) > 1: g["pad_preference_weights"] = [1/ens]*ens + [-opp/ens]*len(w2)
        reqs.append(Request(prompt_ids(p, tok), g))
    basefile = work / f"base-{N}.json"
    if not basefile.exists():
        out = Engine(str(models.base)).generate({"b": [Request(prompt_ids(p, tok)) for p in prompts for _ in range(4)]}, **sampling)["b"]
        basefile.write_text(json.dumps([[prompts[i//4], t.strip(), n] for i, (t, n) in enumerate(zip(out.texts, out.nll))]))
    base = json.loads(basefile.read_text())
    by = defaultdict(list)
    for p, t, n in base: by[p].append(measures_of(t))
    med = {p: {d: median(m[d] for m in own) for d in DIMENSIONS} for p, own in by.items()}
    pad = {**DEFAULTS, "reward_model": reward}
    t0 = time.time()
    out = Engine(str(models.base), pad).generate({"g": reqs}, **sampling)["g"]
    ntok = sum(map(len, out.tokens))
    sat = defaultdict(list); full = defaultdict(list); nl = defaultdict(list); lp=[]; side = {True: [], False: []}; mv=defaultdict(list)
    rows = []
    for (p, v), r, t, tk, n in zip(cells, reqs, out.texts, out.tokens, out.nll):
        d, s = DIRECTIONS[v]; m = measures_of(t.strip())
        x = s*(m[d]-med[p][d]); y = .5*((x>0)+(x>=0))
        sat[v].append(y); full[v].append(len(tk) == MT); nl[v].append(n); lp.append(loops(t)); side[p in prompts[:N]].append(y); mv[v].append(x)
        rows.append(dict(prompt=p, value=v, wish=r.guidance["pad_preference"], text=t.strip(), sat=y, nll=n, loops=lp[-1]))
    (work / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    print(f"== {name} {arg} tok/s {ntok/out.seconds:.0f} {time.time()-t0:.0f}s")
    print(f"satisfied {100*mean(sum(sat.values(), [])):.1f} ours {100*mean(side[True]):.1f} real {100*mean(side[False]):.1f} nll {mean(sum(nl.values(), [])):.3f} (base {mean(b[2] for b in base):.3f}) loops {100*mean(lp):.1f}")
    print(" ".join(f"{v} {100*mean(sat[v]):.0f}/{mean(mv[v]):.2g}/{mean(nl[v]):.2f}" for v in values), "cut detailed", mean(full.get("detailed", [0])), flush=True)
if __name__ == "__main__": main()
