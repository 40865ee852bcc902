// Node's smtp-server for `gateway bench`: answers the questions of peers.py, a JSON object a line.
// Loaded from the folder the bench was started in, or from NODE_PATH. No socket is opened.
'use strict';

const { createHash } = require('node:crypto');
const { createRequire } = require('node:module');
const { Duplex } = require('node:stream');
const path = require('node:path');
const readline = require('node:readline');

const load = createRequire(path.join(process.cwd(), 'here.cjs'));
const { SMTPServer } = load('smtp-server');
const { SMTPStream } = load('smtp-server/lib/smtp-stream.js');
const { SMTPConnection } = load('smtp-server/lib/smtp-connection.js');

const octets = text => Buffer.from(text, 'base64');
const digest = content => ({ octets: content.length, sha256: createHash('sha256').update(content).digest('hex') });
const OPTIONS = { authOptional: true, disableReverseLookup: true, disabledCommands: ['AUTH', 'STARTTLS'], hideSMTPUTF8: false, logger: false };

// --- the client's end of a connection in memory -----------------------------------------

class Wire extends Duplex {
    constructor() {
        super();
        this.remoteAddress = this.localAddress = '127.0.0.1';
        this.remotePort = this.localPort = 1;
        this.readyState = 'open';
        this.said = [];
        this.owed = 0;
        this.heard = null;
    }
    setTimeout() {
        return this;
    }
    _read() {}
    _write(chunk, encoding, done) {
        const text = chunk.toString('latin1');
        this.said.push(text);
        for (const line of text.split('\r\n')) {
            if (/^\d{3}( |$)/.test(line)) {
                this.owed--;
            }
        }
        done();
        if (this.owed <= 0 && this.heard) {
            const heard = this.heard;
            this.heard = null;
            heard();
        }
    }
    replies(count) {
        this.owed += count;
        return this.owed <= 0 ? null : new Promise(resolve => (this.heard = resolve));
    }
}

// --- kinds ------------------------------------------------------------------------------

function commands(task) {
    const lines = octets(task.wire).toString('latin1').split('\r\n').slice(0, -1);
    const raw = lines.map(line => Buffer.from(line, 'latin1'));
    const connection = Object.create(SMTPConnection.prototype);
    connection._server = new SMTPServer(OPTIONS);
    const once = () =>
        raw.map(line => {
            // As the connection does: the verb is looked at first, the handler gets the whole line.
            const text = line.toString('utf-8');
            const verb = text.slice(0, 4).toUpperCase();
            return [verb, connection._parseAddressCommand(verb === 'MAIL' ? 'mail from' : 'rcpt to', text)];
        });
    const told = found =>
        found.map(([verb, parsed]) => {
            const parameters = {};
            for (const [key, value] of Object.entries((parsed && parsed.args) || {})) {
                parameters[key] = value === true ? null : value;
            }
            return { verb, address: parsed ? parsed.address : null, parameters };
        });
    return { once, told };
}

function content(task) {
    const mails = task.mails.map(reads => reads.map(octets));
    const one = reads =>
        new Promise((resolve, reject) => {
            const stream = new SMTPStream();
            const pieces = [];
            const data = stream.startDataMode();
            stream.on('error', reject);
            data.on('data', piece => pieces.push(piece));
            data.on('end', () => resolve(pieces));
            for (const read of reads) {
                stream.write(read);
            }
        });
    const once = async () => {
        const found = [];
        for (const reads of mails) {
            found.push(await one(reads));
        }
        return found;
    };
    return { once, told: found => found.map(pieces => digest(Buffer.concat(pieces))) };
}

async function dialogue(task) {
    const steps = task.steps.map(([reads, replies]) => [reads.map(octets), replies]);
    const wire = new Wire();
    let mails = [];
    const server = new SMTPServer({
        ...OPTIONS,
        onData(stream, session, done) {
            const pieces = [];
            stream.on('data', piece => pieces.push(piece));
            stream.on('end', () => {
                mails.push([session.envelope.mailFrom, session.envelope.rcptTo, pieces]);
                done(null, 'accepted');
            });
        }
    });
    server.on('error', () => {});
    server.connect(wire, {});
    await wire.replies(1);
    wire.push(Buffer.from('EHLO client.example\r\n'));
    await wire.replies(1);
    const once = async () => {
        mails = [];
        wire.said = [];
        for (const [reads, replies] of steps) {
            for (const read of reads) {
                wire.push(read);
            }
            await wire.replies(replies);
        }
        return [wire.said, mails];
    };
    const told = ([said, taken]) => ({
        replies: said
            .join('')
            .split('\r\n')
            .filter(line => /^\d{3}( |$)/.test(line))
            .map(line => Number(line.slice(0, 3))),
        mails: taken.map(([from, to, pieces]) => ({
            from: from ? from.address : '',
            to: to.map(box => box.address),
            ...digest(Buffer.concat(pieces))
        }))
    });
    return { once, told };
}

// --- questions --------------------------------------------------------------------------

const KINDS = { commands, content, dialogue };
let work;

async function seconds(least) {
    for (let times = 1; ; ) {
        const start = process.hrtime.bigint();
        for (let i = 0; i < times; i++) {
            const made = work.once();
            if (made instanceof Promise) {
                await made;
            }
        }
        const spent = Number(process.hrtime.bigint() - start) / 1e9;
        if (spent >= least) {
            return spent / times;
        }
        times = Math.max(times * 2, Math.floor((times * least) / Math.max(spent, 1e-9)));
    }
}

async function answer(question) {
    if (question.version) {
        return { version: load('smtp-server/package.json').version, node: process.versions.node };
    }
    if (question.task) {
        work = await KINDS[question.task.kind](question.task);
        return {};
    }
    if (question.answer) {
        return { answer: work.told(await work.once()) };
    }
    return { seconds: await seconds(question.seconds) };
}

(async () => {
    for await (const line of readline.createInterface({ input: process.stdin })) {
        const told = await answer(JSON.parse(line)).catch(error => ({ broken: String(error) }));
        process.stdout.write(JSON.stringify(told) + '\n');
    }
    process.exit(0);
})();
