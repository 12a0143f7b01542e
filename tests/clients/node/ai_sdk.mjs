// Vercel's AI SDK on the other end of tests/support/foreign.py.
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { embedMany, generateText, jsonSchema, Output, stepCountIs, streamText, tool } from "ai";
import { createInterface } from "node:readline";

// They would come between the answers.
globalThis.AI_SDK_LOG_WARNINGS = false;

const baseURL = process.env.BASE_URL;
const key = { apiKey: "none" };
const compatible = createOpenAICompatible({
  name: "opta",
  baseURL,
  includeUsage: true,
  supportsStructuredOutputs: true,
  ...key,
});
const openai = createOpenAI({ baseURL, ...key });
const anthropic = createAnthropic({ baseURL, ...key });

const models = {
  chat: (model) => compatible.chatModel(model),
  completions: (model) => compatible.completionModel(model),
  responses: (model) => openai.responses(model),
  messages: (model) => anthropic.messages(model),
};

function settings({ api, model, schema, weather, steps, ...options }) {
  const result = { model: models[api](model), maxRetries: 0, ...options };
  if (schema) result.output = Output.object({ schema: jsonSchema(schema) });
  if (weather) {
    result.tools = {
      get_weather: tool({
        description: "The weather of a city",
        inputSchema: jsonSchema({
          type: "object",
          properties: { city: { type: "string" }, days: { type: "integer" } },
          required: ["city"],
        }),
        // Without it the SDK hands the calls back; with it, it goes on with the result.
        ...(steps && { execute: async ({ city }) => `It rains in ${city}.` }),
      }),
    };
  }
  if (steps) result.stopWhen = stepCountIs(steps);
  return result;
}

function calls(list) {
  return list.map(({ toolCallId, toolName, input }) => ({ toolCallId, toolName, input }));
}

const handlers = {
  async generate({ abortAfter, ...options }) {
    const answer = await generateText(settings(options));
    return {
      text: answer.text,
      reasoning: answer.reasoningText ?? null,
      finishReason: answer.finishReason,
      usage: answer.usage,
      calls: calls(answer.toolCalls),
      output: options.schema ? answer.output : null,
      steps: answer.steps.map((step) => ({
        text: step.text,
        calls: calls(step.toolCalls),
        results: step.toolResults.map(({ output }) => output),
      })),
    };
  },

  async stream({ abortAfter, ...options }) {
    const abort = new AbortController();
    let failure = null;
    const answer = streamText({
      ...settings(options),
      abortSignal: abort.signal,
      onError: () => {},
    });
    const parts = [];
    for await (const part of answer.fullStream) {
      parts.push(part);
      if (part.type === "error") failure = part.error;
      if (abortAfter && parts.length === abortAfter) abort.abort();
    }
    if (failure) throw failure;
    const texts = (type) => parts.filter((part) => part.type === type).map((part) => part.text);
    const finish = parts.find((part) => part.type === "finish");
    return {
      texts: texts("text-delta"),
      reasoning: texts("reasoning-delta").join(""),
      inputs: parts.filter(({ type }) => type === "tool-input-delta").map(({ delta }) => delta),
      calls: calls(parts.filter(({ type }) => type === "tool-call")),
      finishReason: finish?.finishReason ?? null,
      usage: finish?.totalUsage ?? null,
      aborted: parts.some(({ type }) => type === "abort"),
    };
  },

  async embed({ model, values }) {
    const answer = await embedMany({
      model: compatible.embeddingModel(model),
      values,
      maxRetries: 0,
    });
    return { embeddings: answer.embeddings, usage: answer.usage };
  },
};

for await (const line of createInterface({ input: process.stdin })) {
  const { call, arguments: options } = JSON.parse(line);
  let answer;
  try {
    answer = { result: await handlers[call](options) };
  } catch (error) {
    const { name, message, statusCode } = error;
    answer = { error: { type: name ?? String(error), message, status: statusCode } };
  }
  process.stdout.write(`${JSON.stringify(answer)}\n`);
}
