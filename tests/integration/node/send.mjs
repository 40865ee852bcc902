// Sends what standard input describes through nodemailer and prints what came of it, both as JSON.
// In: {"port", "lmtp", "pool", "auth": {"user", "pass"}, "mails": [nodemailer's mail options; attachments' contents in base64]}
// Out: [{"accepted", "rejected", "response"} or {"error", "code"}] in the order of the mails.
import { createTransport } from "nodemailer";
import { text } from "node:stream/consumers";

const { port, lmtp = false, pool = 0, auth, mails } = JSON.parse(await text(process.stdin));
const transport = createTransport({
  host: "127.0.0.1",
  port,
  lmtp,
  secure: false,
  ignoreTLS: true,
  name: "node.client.example",
  ...(auth ? { auth } : {}),
  ...(pool ? { pool: true, maxConnections: pool, maxMessages: 1000 } : {}),
});
const results = await Promise.all(
  mails.map(async (mail) => {
    const attachments = (mail.attachments ?? []).map((one) => ({ ...one, content: Buffer.from(one.content, "base64") }));
    try {
      const { accepted, rejected, response } = await transport.sendMail({ ...mail, attachments });
      return { accepted, rejected, response };
    } catch (error) {
      return { error: error.response ?? error.message, code: error.responseCode };
    }
  }),
);
transport.close();
console.log(JSON.stringify(results));
