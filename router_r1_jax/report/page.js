"use strict";
// Episode browser: draws the questions of the JSON block that pass the filters, a page at a time. An open question shows
// the episodes of up to two policies side by side. Text enters the page as text nodes only.
const block = document.querySelector("#data");
if (block) {
  const PAGE = 40; // questions drawn at a time
  const STACK = 3; // episodes of one policy and question shown at once
  const LABELS = { think: "think", search: "route", information: "reply", answer: "answer" };
  const { policies, colours, questions } = JSON.parse(block.textContent);
  const colour = new Map(colours);
  const list = document.querySelector("#questions");
  const count = document.querySelector("#count");
  const more = document.querySelector("#more");
  const fields = new Map([...document.querySelectorAll(".filters [name]")].map((field) => [field.name, field]));
  const value = (name) => fields.get(name).value;

  const element = (tag, kind, ...children) => {
    const made = document.createElement(tag);
    if (kind) made.className = kind;
    made.append(...children);
    return made;
  };
  const dollars = (amount) => {
    if (amount === 0) return "$0.00";
    return "$" + amount.toFixed(Math.max(2, 3 - Math.floor(Math.log10(Math.abs(amount)))));
  };
  const number = (value) => value.toFixed(2);

  // ---- options of the filters ----------------------------------------------------------------------------------------
  const distinct = (values) => [...new Set(values)].sort();
  const offer = (name, entries) => {
    const field = fields.get(name);
    const kept = field.value;
    field.replaceChildren(...entries.map(([key, label]) => {
      const option = element("option", "", label);
      option.value = key;
      return option;
    }));
    if (entries.some(([key]) => key === kept)) field.value = kept;
    field.parentElement.hidden = entries.length < 2;
  };
  const all = (values, none) => [["", none], ...values.map((each) => [each, each])].slice(values.length > 1 ? 0 : 1);

  function offerAll() {
    const inside = questions.filter((question) => question.split === value("split"));
    const episodes = inside.flatMap((question) => question.episodes);
    const numbers = distinct(episodes.map((episode) => String(episode.policy)));
    const named = numbers.map((each) => [each, policies[Number(each)]]).sort((a, b) => a[0] - b[0]);
    const before = [value("left"), value("right")];
    offer("left", named);
    offer("right", [...named, ["", "nobody"]]);
    const kept = numbers.includes(before[0]) && ["", ...numbers].includes(before[1]); // "" is nobody
    if (!kept) fields.get("right").value = named.find(([key]) => key !== value("left"))?.[0] ?? "";
    offer("dataset", all(distinct(inside.map((question) => question.dataset)), "all"));
    offer("hops", all(distinct(inside.map((question) => String(question.hops))), "all"));
    offer("model", [["", "any"], ["no call", "no call at all"], ...all(distinct(
      episodes.flatMap((episode) => episode.calls.map((call) => call[0])).filter(Boolean)), "").filter(([key]) => key)]);
    offer("stop", all(distinct(episodes.map((episode) => episode.stop)), "any"));
    const two = value("right") !== "" && value("right") !== value("left");
    const right = two ? policies[Number(value("right"))] : "";
    const left = policies[Number(value("left"))];
    offer("outcome", [["", "any"], ["1", `${left} right`], ["0", `${left} wrong`], ...(two ? [
      ["10", `only ${left} right`], ["01", `only ${right} right`], ["11", "both right"], ["00", "both wrong"]] : [])]);
  }

  // ---- questions that pass the filters --------------------------------------------------------------------------------
  const of = (question, name) => value(name) === "" ? []
    : question.episodes.filter((episode) => String(episode.policy) === value(name));
  const spoken = new Map(); // question -> its text in lower case, filled by the first search
  const words = (question) => {
    if (!spoken.has(question)) {
      const said = question.episodes.flatMap((episode) => episode.segments.map((segment) => segment[1]));
      spoken.set(question, [question.id, question.question, ...question.golds, ...said].join("\n").toLowerCase());
    }
    return spoken.get(question);
  };
  function passes(question) {
    if (question.split !== value("split")) return false;
    if (value("dataset") && question.dataset !== value("dataset")) return false;
    if (value("hops") && String(question.hops) !== value("hops")) return false;
    const left = of(question, "left");
    const right = value("right") === value("left") ? [] : of(question, "right");
    if (!left.length && !right.length) return false;
    const model = value("model");
    const asks = (episode) => model === "no call" ? !episode.calls.length : episode.calls.some((call) => call[0] === model);
    const either = [...left, ...right];
    if (model && !either.some(asks)) return false;
    if (value("stop") && !either.some((episode) => episode.stop === value("stop"))) return false;
    const outcome = value("outcome");
    if (outcome) {
      const sides = outcome.length === 1 ? [left] : [left, right];
      if (!sides.every((side, i) => side.length && side[0].right === Number(outcome[i]))) return false;
    }
    const wanted = value("words").toLowerCase();
    return !wanted || words(question).includes(wanted);
  }

  // ---- drawing -------------------------------------------------------------------------------------------------------
  const model = (name) => {
    const made = element("span", "model", name || "no model");
    if (colour.has(name)) {
      const dot = element("i", "dot");
      dot.style.background = colour.get(name);
      made.prepend(dot);
    }
    return made;
  };
  const segment = ([kind, text]) => {
    const body = element("bdi");
    const [name, ...rest] = text.split(":");
    if (kind === "search" && colour.has(name.trim())) body.append(model(name.trim()), ": " + rest.join(":").trim());
    else body.append(text);
    const known = Object.hasOwn(LABELS, kind);
    return element("div", `segment ${known ? kind : "text"}`, element("span", "tag", known ? LABELS[kind] : "other"), body);
  };
  const thought = (text) => element("details", "", element("summary", "", "thought"), element("bdi", "thought", text));
  const call = ([name, outcome, tokens, charged, seconds, thoughts]) => element("li", "",
    model(name), " ", element("span", "outcome", outcome), ` ${tokens} tokens · ${dollars(charged)} · ${number(seconds)} s`,
    ...(thoughts ? [thought(thoughts)] : []));
  const verdict = (episode) => element("span", episode.right ? "verdict good" : "verdict", episode.right ? "right" : "wrong");
  const drawEpisode = (episode) => {
    const [total, format, outcome, cost] = episode.reward;
    return element("section", episode.right ? "episode right" : "episode",
      element("header", "", element("b", "", policies[episode.policy]),
        element("span", "muted", `step ${episode.step}`), verdict(episode)),
      element("p", "score", element("b", "", dollars(episode.dollars)), ` · reward ${number(total)} · F1 ${number(episode.f1)}`),
      element("p", "score muted", `reward of format ${number(format)}, outcome ${number(outcome)}, cost ${number(cost)} · ended by ${episode.stop}`
        + (episode.faults.length ? ` · malformed: ${episode.faults.join(", ")}` : "")),
      element("div", "response", ...episode.segments.map(segment)),
      episode.calls.length ? element("ol", "calls", ...episode.calls.map(call)) : element("p", "calls muted", "no call"));
  };
  const column = (episodes, name) => {
    const made = element("div", "column", ...episodes.slice(0, STACK).map(drawEpisode));
    if (!episodes.length) made.append(element("p", "muted", `${name} has no episode of this question here`));
    if (episodes.length > STACK) {
      const button = element("button", "", `${episodes.length - STACK} more episodes`);
      button.addEventListener("click", () => button.replaceWith(...episodes.slice(STACK).map(drawEpisode)));
      made.append(button);
    }
    return made;
  };
  function drawQuestion(question) {
    const left = of(question, "left");
    const two = value("right") !== "" && value("right") !== value("left");
    const sides = two ? [left, of(question, "right")] : [left];
    const marks = sides.filter((side) => side.length).map((side) => verdict(side[0]));
    const facts = [question.dataset, question.hops ? `${question.hops}-hop` : "", question.id].filter(Boolean).join(" · ");
    const made = element("details", "question",
      element("summary", "", element("span", "marks", ...marks), element("bdi", "asked", question.question),
        element("span", "facts", element("span", "gold", element("bdi", "", question.golds.join(" · "))), facts)));
    made.addEventListener("toggle", () => {
      if (!made.open || made.querySelector(".episodes")) return;
      made.append(element("div", "episodes",
        ...sides.map((side, i) => column(side, policies[Number(value(i ? "right" : "left"))]))));
    });
    return made;
  }

  // ---- the list ------------------------------------------------------------------------------------------------------
  let found = [];
  let drawn = 0;
  function extend() {
    list.append(...found.slice(drawn, drawn + PAGE).map(drawQuestion));
    drawn = Math.min(drawn + PAGE, found.length);
    more.hidden = drawn === found.length;
    more.textContent = `show ${Math.min(PAGE, found.length - drawn)} more of ${found.length}`;
  }
  function apply() {
    offerAll();
    found = questions.filter(passes);
    drawn = 0;
    list.replaceChildren();
    extend();
    if (list.firstElementChild) list.firstElementChild.open = true;
    count.textContent = `${found.length} of ${questions.filter((question) => question.split === value("split")).length} questions`;
  }
  offer("split", [...new Set(questions.map((question) => question.split))].map((each) => [each, each]));
  let waiting = 0;
  document.querySelector(".filters").addEventListener("input", (event) => {
    clearTimeout(waiting); // a search runs when typing pauses
    waiting = setTimeout(apply, event.target.name === "words" ? 200 : 0);
  });
  more.addEventListener("click", extend);
  new IntersectionObserver((entries) => entries.some((entry) => entry.isIntersecting) && !more.hidden && extend(),
    { rootMargin: "600px" }).observe(more);
  apply();
}
