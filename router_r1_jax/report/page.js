"use strict";
// Shows the questions that pass every filter. A question passes when one of its episodes does; where a policy is chosen,
// the other policies' episodes are hidden.
const filters = document.querySelector(".filters");
if (filters) {
  const questions = [...document.querySelectorAll(".question")];
  const count = document.querySelector("#count");
  const apply = () => {
    const value = (name) => filters.querySelector(`[name=${name}]`)?.value ?? "";
    const words = value("words").toLowerCase();
    let shown = 0;
    for (const question of questions) {
      let some = false;
      for (const episode of question.querySelectorAll(".episode")) {
        const chosen = !value("policy") || episode.dataset.policy === value("policy");
        episode.hidden = !chosen;
        some ||= chosen && (!value("verdict") || episode.dataset.verdict === value("verdict"));
      }
      const kept = ["hops", "split", "change"].every((name) => !value(name) || question.dataset[name] === value(name));
      question.hidden = !(some && kept && question.textContent.toLowerCase().includes(words));
      shown += !question.hidden;
    }
    count.textContent = `${shown} of ${questions.length} questions`;
  };
  filters.addEventListener("input", apply);
  apply();
}
