-- The preference store, `prefab.duckdb`: all of it is computed from `ledger.sqlite` and can be deleted at any time.
-- Ids are content digests. `call` is a key of the ledger in hex; messages and raw texts of calls stay there.
-- No primary keys: they cost half the speed and twice the file. One writer inserts what is not there.

CREATE TABLE meta (name VARCHAR, value VARCHAR);
CREATE TABLE watermarks (source VARCHAR, id BIGINT);   -- how far each of the ledger's tables has been read
-- Prompts of runs whose rows are to be derived again: `todo`, or `open` until calls arrive that they wait for.
CREATE TABLE work (run INTEGER, prompt BIGINT, state VARCHAR, fresh BOOLEAN);

CREATE TABLE runs (run INTEGER, name VARCHAR, version INTEGER, latest BOOLEAN, recipe VARCHAR, constitution VARCHAR,
    config VARCHAR, last_start INTEGER, started_at DOUBLE);
CREATE TABLE models (model VARCHAR, kind VARCHAR, name VARCHAR);
CREATE TABLE constitutions (constitution VARCHAR, id VARCHAR, title VARCHAR, licence VARCHAR, selection VARCHAR,
    source VARCHAR);
CREATE TABLE principles (constitution VARCHAR, principle VARCHAR, position INTEGER, digest VARCHAR, title VARCHAR,
    compare VARCHAR, critique VARCHAR, revise VARCHAR, criterion VARCHAR, weight DOUBLE, tags VARCHAR[],
    enabled BOOLEAN);
-- `messages` is JSON, [[role, text], ...], and so is `rubric`, the prompt's own: [[criterion, points], ...], NULL without.
CREATE TABLE prompts (prompt VARCHAR, text VARCHAR, messages VARCHAR, tags VARCHAR[], "group" VARCHAR, split VARCHAR,
    rubric VARCHAR);

-- An answer of the policy. `parent` is the index of the answer it revises, -1 for a draft. `text` is NULL, with a
-- `reason`, when the model gave none that can be read. `thinking` is what a reasoning model wrote before its answer.
-- `context`: the turns between the prompt and this answer, as `messages`, where it follows turns that the prompt's other
-- answers do not follow (imported conversations); NULL otherwise.
CREATE TABLE samples (sample VARCHAR, run INTEGER, prompt VARCHAR, "index" INTEGER, parent INTEGER, round INTEGER,
    principle VARCHAR, text VARCHAR, finish VARCHAR, reason VARCHAR, call VARCHAR, thinking VARCHAR,
    context VARCHAR);
-- `fault` is NULL, with a `reason`, when the critique could not be read. `p_fault` is the probability of a fault at its
-- first word, of `mass` that "no fault" and "a fault" have together; both NULL where `exactness` is hard: no probability
-- was given, or asked for.
CREATE TABLE critiques (critique VARCHAR, run INTEGER, prompt VARCHAR, "index" INTEGER, principle VARCHAR,
    round INTEGER, fault BOOLEAN, reason VARCHAR, text VARCHAR, call VARCHAR, thinking VARCHAR, p_fault DOUBLE,
    mass DOUBLE, exactness VARCHAR);
CREATE TABLE calls (call VARCHAR, model VARCHAR, finish VARCHAR, exactness VARCHAR, prompt_tokens INTEGER,
    completion_tokens INTEGER, limit_tokens INTEGER, answered_at DOUBLE);
-- What one answer got from a judge that reads one at a time, on that judge's own scale: an expected grade, P(yes) for a
-- rubric's criterion, a reward. `criterion` and its `points` where the prompt has a rubric of its own (its `principle` is
-- empty, as for a program, which needs none). `value` is NULL, with a `reason`, when it could not be read.
CREATE TABLE scores (score VARCHAR, run INTEGER, prompt VARCHAR, "index" INTEGER, principle VARCHAR, judge VARCHAR,
    repeat INTEGER, criterion VARCHAR, points DOUBLE, value DOUBLE, reason VARCHAR, mass DOUBLE, exactness VARCHAR,
    call VARCHAR);
-- What a judge says of one step (a line or paragraph) of an answer; `step` counts from 0. `p_right` is the probability that
-- the step is right, from `value`, which is on the judge's own scale; both NULL, with a `reason`, when it could not be read.
-- `text` is the step's, NULL where the answer is not known.
CREATE TABLE steps (score VARCHAR, run INTEGER, prompt VARCHAR, "index" INTEGER, step INTEGER, text VARCHAR,
    principle VARCHAR, judge VARCHAR, repeat INTEGER, p_right DOUBLE, value DOUBLE, reason VARCHAR, mass DOUBLE,
    exactness VARCHAR, call VARCHAR);
-- All answers ordered at once: their indices as they were shown and from best to worst; NULL, with a `reason`: unread.
CREATE TABLE rankings (ranking VARCHAR, run INTEGER, prompt VARCHAR, principle VARCHAR, judge VARCHAR, repeat INTEGER,
    permutation INTEGER, shown INTEGER[], ranked INTEGER[], reason VARCHAR, call VARCHAR);
-- One judgment in one order; `p_a` and `winner` speak of answer `a` in either order. NULL, with a `reason`: unscored.
-- From scores or rankings it was asked in no order: `order` is '-', and it stands on several calls, so `call` is NULL.
CREATE TABLE verdicts (verdict VARCHAR, run INTEGER, prompt VARCHAR, a INTEGER, b INTEGER, principle VARCHAR,
    judge VARCHAR, "order" VARCHAR, repeat INTEGER, p_a DOUBLE, winner VARCHAR, reason VARCHAR, mass DOUBLE,
    tie_mass DOUBLE, exactness VARCHAR, call VARCHAR);
-- One exists once all calls of the comparison are answered. `outcome` is a, b, tie or unscored. `escalation`, where a
-- stronger judge is asked about some comparisons only: why it was asked (unsure, divided, unscored), `settled` without
-- it, or `budget` where it would have been asked but the share was spent on others. `vote_share`: the share of the vote
-- for `chosen`. `calibrated`: whose word `p_chosen` was calibrated on (human, oracle, or retest: the judges' own second
-- answers); NULL: nobody's, so that it is the share of the vote.
CREATE TABLE preferences (preference VARCHAR, run INTEGER, prompt VARCHAR, a INTEGER, b INTEGER, outcome VARCHAR,
    chosen INTEGER, rejected INTEGER, p_a DOUBLE, p_chosen DOUBLE, spread DOUBLE, n_scored INTEGER,
    n_readings INTEGER, exactness VARCHAR, identical BOOLEAN, escalation VARCHAR, vote_share DOUBLE,
    calibrated VARCHAR);
-- How strong an answer is, where a run chooses its pairs by a fit: the logarithm of its worth, centred on 0 within its
-- prompt, from all of the prompt's comparisons once they are settled. NULL, with a `reason`: there is no fit.
CREATE TABLE strengths (run INTEGER, prompt VARCHAR, "index" INTEGER, method VARCHAR, strength DOUBLE, se DOUBLE,
    reason VARCHAR);
-- Calls without an answer, once for each time that one failed. `kind` is refused (by the server, for good), engine_died
-- (the server that Prefab started dies of it; not asked again either), rate_limit, server_error, timeout, no_connection,
-- malformed (an answer that cannot be read), transport (any other), or left_out (not a call, but a row of the ledger that
-- the store cannot hold). `reason` is the message without addresses and numbers.
CREATE TABLE failures (run INTEGER, call VARCHAR, kind VARCHAR, reason VARCHAR, error VARCHAR, failed_at DOUBLE);
CREATE TABLE human_labels (label VARCHAR, prompt VARCHAR, winner VARCHAR, annotator VARCHAR, value VARCHAR,
    labelled_at DOUBLE);
CREATE TABLE evals (eval VARCHAR, name VARCHAR, value VARCHAR, evaluated_at DOUBLE);
-- What the latest `prefab audit data` of a run says is wrong with a preference, by rule. Nothing is deleted: an export
-- leaves marked rows out when told to. `of_prompt`: it concerns the prompt, whatever its answers.
CREATE TABLE marks (run INTEGER, preference VARCHAR, rule VARCHAR, detail VARCHAR, of_prompt BOOLEAN);

-- Pairs to train on: decided preferences with both texts. Either text may have been cut off: see its `finish`.
CREATE VIEW pairs AS
SELECT p.preference, r.name, r.version, r.latest, p.run, p.prompt, q.messages, q.tags, q."group", q.split,
    c.text AS chosen, j.text AS rejected, p.p_chosen, p.vote_share, p.calibrated, p.spread, p.n_scored, p.n_readings, p.exactness,
    c.sample AS chosen_sample, j.sample AS rejected_sample, c."index" AS chosen_index, j."index" AS rejected_index,
    c.finish AS chosen_finish, j.finish AS rejected_finish
FROM preferences p
JOIN runs r ON r.run = p.run
JOIN samples c ON c.run = p.run AND c.prompt = p.prompt AND c."index" = p.chosen
JOIN samples j ON j.run = p.run AND j.prompt = p.prompt AND j."index" = p.rejected
LEFT JOIN prompts q ON q.prompt = p.prompt;

-- One judge under one principle: both orders of a comparison side by side, for position consistency. Where nothing was
-- asked in an order (scores, rankings) both sides are NULL, and `winner` is what they say together: such a judge is
-- neither consistent nor inconsistent.
CREATE VIEW readings AS
SELECT run, prompt, a, b, principle, judge, repeat,
    max(p_a) FILTER (WHERE "order" = 'ab') AS p_ab, max(p_a) FILTER (WHERE "order" = 'ba') AS p_ba,
    max(winner) FILTER (WHERE "order" = 'ab') AS winner_ab, max(winner) FILTER (WHERE "order" = 'ba') AS winner_ba,
    max(winner) FILTER (WHERE "order" = '-') AS winner,
    CASE WHEN count(*) = count(p_a) THEN avg(p_a) END AS p_a
FROM verdicts GROUP BY ALL;

-- What could not be read, by reason.
CREATE VIEW unscored AS
SELECT run, 'judge' AS role, reason, count(*) AS n FROM verdicts WHERE reason IS NOT NULL AND "order" <> '-' GROUP BY ALL
UNION ALL
SELECT run, 'score', reason, count(*) FROM scores WHERE reason IS NOT NULL GROUP BY ALL
UNION ALL
SELECT run, 'step', reason, count(*) FROM steps WHERE reason IS NOT NULL GROUP BY ALL
UNION ALL
SELECT run, 'rank', reason, count(*) FROM rankings WHERE reason IS NOT NULL GROUP BY ALL
UNION ALL
SELECT run, 'critique', reason, count(*) FROM critiques WHERE reason IS NOT NULL GROUP BY ALL
UNION ALL
SELECT run, CASE WHEN parent < 0 THEN 'sample' ELSE 'revise' END, reason, count(*) FROM samples
WHERE reason IS NOT NULL GROUP BY ALL;

-- How often the stronger judge was asked, of the comparisons that could be (equal texts never are).
CREATE VIEW escalations AS
SELECT run, count(*) AS comparisons,
    count(*) FILTER (WHERE escalation IN ('unsure', 'divided', 'unscored')) AS escalated,
    count(*) FILTER (WHERE escalation = 'unsure') AS unsure,
    count(*) FILTER (WHERE escalation = 'divided') AS divided,
    count(*) FILTER (WHERE escalation = 'unscored') AS unscored,
    count(*) FILTER (WHERE escalation = 'budget') AS over_budget
FROM preferences WHERE escalation IS NOT NULL GROUP BY ALL;

-- What a served model does otherwise than most, by its last probe (before the first question that is paid for). `labels`:
-- whether it begins its answer with a label; where not, `begins` is what it began with. `temperature`: whether it accepts
-- one; `left_out` has all fields that it refuses. `thinking` is no, unless_told or always.
CREATE VIEW model_probes AS
SELECT json_extract_string(value, '$.subject') AS model,
    CAST(value -> '$.metrics.system_role' AS BOOLEAN) AS system_role,
    json_extract_string(value, '$.metrics.begins') = '' AS labels,
    CAST(value -> '$.metrics.logprobs' AS BOOLEAN) AS logprobs,
    CAST(value -> '$.metrics.top_logprobs' AS INTEGER) AS top_logprobs,
    json_extract_string(value, '$.metrics.max_tokens_field') AS max_tokens_field,
    NOT list_contains(CAST(value -> '$.metrics.left_out' AS VARCHAR[]), 'temperature') AS temperature,
    json_extract_string(value, '$.metrics.thinking') AS thinking,
    CAST(value -> '$.metrics.opens_thinking' AS BOOLEAN) AS opens_thinking,
    CAST(value -> '$.metrics.tool_parser' AS BOOLEAN) AS tool_parser,
    json_extract_string(value, '$.metrics.begins') AS begins,
    CAST(value -> '$.metrics.left_out' AS VARCHAR[]) AS left_out,
    evaluated_at AS probed_at
FROM evals WHERE name = 'model probe'
QUALIFY row_number() OVER (PARTITION BY model ORDER BY evaluated_at DESC) = 1;

-- Prompts of a run that wait for calls: unfinished or failed. Running the same command again asks for them.
CREATE VIEW waiting AS
SELECT run, count(*) AS prompts FROM work GROUP BY ALL;

-- A run at a glance.
CREATE VIEW summary AS
SELECT r.run, r.name, r.version, r.latest,
    (SELECT count(*) FROM samples s WHERE s.run = r.run AND s.parent < 0) AS drafts,
    (SELECT count(*) FROM samples s WHERE s.run = r.run AND s.parent >= 0) AS revisions,
    (SELECT count(*) FROM critiques c WHERE c.run = r.run) AS critiques,
    (SELECT count(*) FROM verdicts v WHERE v.run = r.run) AS verdicts,
    (SELECT count(*) FROM preferences p WHERE p.run = r.run AND outcome IN ('a', 'b')) AS decided,
    (SELECT count(*) FROM preferences p WHERE p.run = r.run AND outcome = 'tie') AS ties,
    (SELECT count(*) FROM preferences p WHERE p.run = r.run AND outcome = 'unscored') AS unscored,
    (SELECT count(DISTINCT call) FROM failures f WHERE f.run = r.run) AS failed_calls
FROM runs r;
