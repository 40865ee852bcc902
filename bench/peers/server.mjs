// The peers on smtp-server: `node server.mjs discard|relay|webhook PORT FAR CONNECTIONS`.
// Found in the folder that NODE_PATH's package.json names; the 250 follows the far side's own.
import { createRequire } from 'node:module';

const [mode, port, far, connections] = process.argv.slice(2);
const load = createRequire(`${process.env.PEERS}/package.json`);
const { SMTPServer } = load('smtp-server');

const whole = (stream, done) => {
  const parts = [];
  stream.on('data', (part) => parts.push(part));
  stream.on('end', () => done(Buffer.concat(parts)));
};

const taken = {
  discard() {
    return (stream, session, callback) => {
      stream.on('end', () => callback());
      stream.resume();
    };
  },
  relay() {
    const pool = load('nodemailer').createTransport({
      host: '127.0.0.1', port: Number(far), secure: false, ignoreTLS: true,
      pool: true, maxConnections: Number(connections), maxMessages: Infinity,
    });
    return (stream, session, callback) => whole(stream, (raw) => {
      const envelope = { from: session.envelope.mailFrom.address, to: session.envelope.rcptTo.map(({ address }) => address) };
      pool.sendMail({ envelope, raw }, (error) => callback(error));
    });
  },
  webhook() {
    const pool = new (load('undici').Pool)(`http://127.0.0.1:${far}`, { connections: Number(connections) });
    const headers = { 'content-type': 'message/rfc822' };
    return (stream, session, callback) => whole(stream, async (body) => {
      try {
        const answer = await pool.request({ path: '/', method: 'POST', headers, body });
        await answer.body.dump();
        callback(answer.statusCode < 300 ? null : new Error(String(answer.statusCode)));
      } catch (error) {
        callback(error);
      }
    });
  },
};

const server = new SMTPServer({
  disabledCommands: ['AUTH', 'STARTTLS'], disableReverseLookup: true, logger: false, onData: taken[mode](),
});
server.on('error', () => {}); // a client that is gone
server.listen({ port: Number(port), host: '127.0.0.1', backlog: 1024 });
